"""
The sparse Adam step on the CPU. Private: called by sparseadam.update.native alone.
"""

from collections.abc import Sequence


class MomentMemory:
    """Where a table's moments are, by address; 0 for those it does without."""

    def __init__(self, *, type: str, one_exp_avg_sq_a_row: bool, exp_avg: int, exp_avg_sq: int, max_exp_avg_sq: int, exp_avg_stride: int, exp_avg_sq_stride: int, exp_avg_scale: int, exp_avg_sq_scale: int, scale_stride: int, row_steps: int, paid_log_decay: int, moment_steps: int, weight_steps: int, clock_stride: int) -> None: ...

class Table:
    """A table and its compact moments, by address."""

    def __init__(self, *, table: int, table_stride: int, element_type: str, sparse_shape: Sequence[int], width: int, moments: MomentMemory, slot_of_row: int, wide_slots: bool, rows: int, stochastic_rounding: bool, stream: int, row_names: int) -> None: ...

def element_types() -> list[str]:
    """Names of the table dtypes that this build can update."""

def instruction_sets() -> list[str]:
    """Names of the instruction sets at hand, slowest first."""

def fits(num_rows: int, num_lookups: int) -> bool:
    """Whether a step of this size fits the packed (row, position) entries."""

def step(tables: Sequence[tuple[Table, int, int, int, Sequence[float], tuple[int, int], tuple[int, int, int, HistoryCache]]], instruction_set: str, num_threads: int) -> tuple[int, tuple[int, int] | None, list[int], bool] | None:
    """
    Update all tables and their counters (addresses of step, num_slots and num_skipped, and of log_decay), or
    none. Returns None, or why not: (table, (dimension, index) or None, rows that are refused, whether because
    they are behind; otherwise their gradient is not finite). A history is (address, base, number of steps,
    its cache), (0, 0, 0, None) where missed steps are not replayed.
    """

class HistoryCache:
    """
    What the steps of one history add up to, taken in as catch_up needs it, and what it found
    of the rows last read.
    """

    def __init__(self) -> None: ...

def catch_up(*, table: Table, rows: int, num_rows_read: int, counters: tuple[int, int], history: tuple[int, int, int, HistoryCache], seed: int, instruction_set: str, num_threads: int) -> bool:
    """
    Move the rows that are behind, and count the slots that some may have got; or none of them. Returns whether
    all rows are inside the table.
    """

class Coalescing:
    """The rows of a gradient's lookups, sorted, which are not kept alive."""

    def __init__(self, *, indices: int, sparse_shape: Sequence[int], num_lookups: int, num_threads: int) -> None: ...

    @property
    def num_touched(self) -> int: ...

    @property
    def has_bad_index(self) -> bool: ...

    def sum(self, *, values: int, width: int, element_type: str, instruction_set: str, rows: int, sums: int, num_threads: int) -> None:
        """
        Write the touched rows and the sums of their values, in the dtype of their moments.
        """

class SteadyStep:
    """A step whose tables all look as they did when they were listed here."""

    def add_group(self) -> None: ...

    def add_table(self, *, parameter: object, native_table: object, counters: tuple[int, int], history_of: object | None) -> None: ...

    def add_idle(self, parameter: object) -> None: ...

    def add_dense(self, parameter: object, state: dict[str, object]) -> None: ...

    def remember_state(self, state: dict[object, object]) -> None: ...

    def remember_options(self, groups: list[dict[str, object]]) -> None: ...

    def are_options_as_before(self, groups: list[dict[str, object]]) -> bool: ...

    def run(self, state: dict[object, object], groups: list[object], scalars_at: list[object], report_writes: object, instruction_set: str, num_threads: int) -> list[object] | None:
        """
        Step all tables that have a gradient and report those that were written: the gradients of the dense
        parameters (None where there is none); or None and nothing written where something is not as it was.
        """

def initial_values(*, distribution: str, scale: float, seed: int, rows: int, num_rows: int, width: int, element_type: str, values: int) -> None:
    """Write the initial values of rows, in float32 or float64."""

def steady_step(tensor_type: object) -> SteadyStep | None:
    """
    An empty SteadyStep, or None where the tensors of this type cannot be read through DLPack's C interface.
    """
