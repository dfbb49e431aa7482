"""What the benchmark raises on purpose."""


class BenchError(Exception):
    """What went wrong and what to do about it, in one sentence for the person at the terminal."""

    exit_code = 1


class UsageError(BenchError):
    """Something asked for on the command line cannot be had."""

    exit_code = 2
