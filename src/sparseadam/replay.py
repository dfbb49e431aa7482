r"""Replaying missed steps: rows are brought to where dense Adam would have them before they are read.

With ``missed_steps="replay"`` a step updates the moments of the touched rows alone and notes its numbers
(``history.py``). A row that is about to be read is first moved by all the steps that its weights have yet to take: its
own last one, whose gradient its moments hold, and those it has missed since. ``update.catch_up`` does that; here it is
decided when. ``docs/replay.md`` derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import RLock

import torch
from torch import Tensor, nn

from . import update
from ._memory import in_stretches
from ._validate import GroupOptions, Place
from .moments import ROWS_AT_ONCE, Moments
from .reading import Hook, Hooks, Removable, before_reading
from .update import RowsRead

# A history ends where all rows are brought up to date: at the latest after as many steps as these, or as this share of
# the table's rows. So it takes little beside the moments, and a pass over the table is spread over many steps.
_MAX_STEPS = 1 << 12
_ROWS_A_STEP = 64

# Threads may read the same rows at once, as replicas of a model do, and while another one steps. Each row is to be
# moved once, and what tells whether it was must not change meanwhile: they take turns.
TURNS = RLock()


def catch_up(
    table: Tensor, moments: Moments, rows: Tensor, place: Place, options: GroupOptions, backend: str | None
) -> None:
    """Move ``rows`` of a table by the steps that their weights have yet to take; threads that do so take turns.

    Raises:
        IndexError: a row outside the table. Nothing was changed.
    """
    rows = rows.to(table.device).contiguous()
    read = RowsRead(place, table, moments, rows, options.seed or 0, options.stochastic_rounding)
    with TURNS:
        update.catch_up(read, backend)


def flush(table: Tensor, moments: Moments, place: Place, options: GroupOptions, backend: str | None) -> None:
    """Move all rows of a table by the steps that their weights have yet to take; a new history begins."""
    history = moments.history
    assert history is not None, "only where missed steps are replayed"
    if history.num_steps == 0:
        return

    def catch_up_slots(begin: int, end: int) -> None:
        catch_up(table, moments, moments.rows[begin:end], place, options, backend)

    in_stretches(catch_up_slots, moments.num_slots, ROWS_AT_ONCE)
    if history.log_decay != 0.0:
        rounds = options.stochastic_rounding
        update.decay_untouched(table, moments, place, options.seed or 0, stochastic_rounding=rounds)
    moments.settle()


def has_rows_behind(moments: Moments) -> bool:
    """Whether the weights of any row of a table have yet to take a step."""
    if moments.history is None:
        return False
    slots = torch.arange(moments.num_slots, device=moments.device)
    return moments.history.log_decay != 0.0 or bool(moments.are_behind(slots).any())


def is_flush_due(moments: Moments) -> bool:
    """Whether a history has grown so long that bringing all rows up to date costs little beside its steps."""
    history = moments.history
    return history is not None and history.num_steps >= max(_MAX_STEPS, moments.num_rows // _ROWS_A_STEP)


def attach(
    model: nn.Module,
    tables: Iterable[Tensor],
    catch_up: Callable[[Tensor, Tensor], None],
    flush: Callable[[], None],
) -> Hooks:
    """Hook the modules of a model that read one of some tables.

    Args:
        model: the module and all that it consists of.
        tables: the parameters that may be behind.
        catch_up: called with a table and rows of it, before they are read.
        flush: called before whole tables are read or replaced: saved, or loaded; and before the hooks are taken off,
            for nobody brings rows up to date from then on.
    """
    tables = list(tables)
    handles: list[Removable] = [before_reading(model, tables, catch_up)]
    watched = {id(table) for table in tables}
    for module in model.modules():
        if any(id(parameter) in watched for parameter in module.parameters(recurse=False)):
            hook = Hook(lambda *_: flush())
            handles.append(module.register_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]
            handles.append(module.register_load_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]
    return Hooks(handles, at_end=flush if tables else None)
