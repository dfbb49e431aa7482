"""
The sparse Adam step on the CPU. Private: called by sparseadam.update.native alone.
"""

from collections.abc import Sequence


class Table:
    """A table and its compact moments, by address."""

    def __init__(self, *, table: int, table_stride: int, element_type: str, sparse_shape: Sequence[int], width: int, exp_avg: int, exp_avg_sq: int, moment_stride: int, slot_of_row: int, wide_slots: bool, rows: int) -> None: ...

def element_types() -> list[str]:
    """Names of the table dtypes that this build can update."""

def instruction_sets() -> list[str]:
    """Names of the instruction sets at hand, slowest first."""

def fits(num_rows: int, num_lookups: int) -> bool:
    """Whether a step of this size fits the packed (row, position) entries."""

def step(tables: Sequence[tuple[Table, int, int, int, int, Sequence[float]]], instruction_set: str, num_threads: int) -> tuple[list[int], tuple[int, int, int, int] | None]:
    """
    Update all tables, or none. Returns the slots in use of each and the first bad index, if any, as
    (table, lookup, dimension, index).
    """

class SteadyStep:
    """A step whose tables all look as they did when they were listed here."""

    def add_group(self) -> None: ...

    def add_table(self, *, parameter: object, moments: object, native_table: object, counters: int) -> None: ...

    def add_idle(self, parameter: object) -> None: ...

    def run(self, state: dict[object, object], groups: list[object], scalars_at: list[object], instruction_set: str, num_threads: int) -> list[object] | None:
        """
        Step all tables that have a gradient: the parameters that were written, or None and nothing written where
        something is not as it was.
        """

def steady_step(tensor_type: object) -> SteadyStep | None:
    """
    An empty SteadyStep, or None where the tensors of this type cannot be read through DLPack's C interface.
    """
