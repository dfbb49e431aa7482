"""What the recipes' command lines share: the one error that they raise on purpose, how it ends them, and checks."""

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


def check_writable(directory: Path) -> None:
    """Create the output directory and prove that a file can be made there, before any work."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise RecipeError(f"cannot write to {directory}: {error.strerror or error}.") from error
