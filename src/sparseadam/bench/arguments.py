"""What command lines here share: whole numbers within bounds, and help that names defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
