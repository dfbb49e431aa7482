"""What the recipes' command lines share: the one error that they raise on purpose, how it ends them, and checks."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class RecipeError(Exception):
    """What went wrong and what to do about it, in one sentence for the person at the terminal."""


def exit_code(recipe: str, run: Callable[[], None], stopped: str = "stopped.") -> int:
    """Run a recipe; say in a line why it ended early, if it did, and return the exit code."""
    try:
        run()
    except RecipeError as error:
        print(f"{recipe}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{recipe}: {stopped}", file=sys.stderr)
        return 130
    return 0


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in ``[low, high]``, for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} does not lie in [{low}, {high}]")
        return value

    return parse


def check_writable(directory: Path) -> None:
    """Create the output directory and prove that a file can be made there, before any work."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise RecipeError(f"cannot write to {directory}: {error.strerror or error}.") from error
