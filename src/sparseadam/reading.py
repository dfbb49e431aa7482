"""Telling which rows of a table a model is about to read, before it reads them.

Rows that are kept behind, or made on first touch, must be brought into shape before the forward pass looks them up.
Modules that look rows up are hooked here; what has to be done is the callback's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

# Called with a table and the rows of it that are about to be read, int64 ``[num_rows_read]``, repeats included.
ReadCallback = Callable[[Tensor, Tensor], None]


class Removable(Protocol):
    """What registering a hook returns."""

    def remove(self) -> None:
        """Take the hook off."""


@runtime_checkable
class AnnouncesReads(Protocol):
    """A module of another kind that tells itself which rows of its own parameters it is about to read."""

    def register_read_hook(self, callback: ReadCallback) -> Removable:
        """Have ``callback(table, rows)`` called before rows of a table are read."""


class Hooks:
    """Hooks of the modules of a model; ``remove()``, or leaving it as a context, takes them off."""

    def __init__(self, handles: list[Removable], at_end: Callable[[], None] | None = None) -> None:
        """Hold the handles of what was hooked, and what is to be done before they are taken off."""
        self._handles = handles
        self._at_end = at_end

    def remove(self) -> None:
        """Take all hooks off; a second call does nothing."""
        if self._at_end is not None:
            self._at_end()
            self._at_end = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Hooks:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take all hooks off."""
        self.remove()


class Hook:
    """A hook that does nothing any more where it was copied or pickled along with its module.

    The copy has parameters of its own; what the hook does would be done to the original's.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        """Call ``function`` with what the module passes."""
        self._function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        """Be called by the module."""
        self._function(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """Copy and pickle as what stands in the copied module."""
        return _hook_of_a_copy, ()


def _without_effect(*_: Any) -> None:
    """Stand where the hook of a copied module stood."""


def _hook_of_a_copy() -> Callable[..., None]:
    return _without_effect


def before_reading(model: nn.Module, tables: Iterable[Tensor], callback: ReadCallback) -> Hooks:
    """Call ``callback(table, rows)`` whenever modules of a model are about to look up rows of some tables.

    Hooked are ``nn.Embedding`` and ``nn.EmbeddingBag``, those that derive from them included, whose ``weight`` is one
    of the tables, and every module with a ``register_read_hook`` of its own. In training and evaluation alike. Rows at
    a padding index count as read. A copy of the model, or one that was saved whole, has tables of its own and is not
    hooked.

    Args:
        model: the module and all that it consists of.
        tables: the parameters to watch.
        callback: gets the table and int64 rows ``[num_rows_read]``, in no order and with repeats.
    """
    watched = {id(table) for table in tables}
    handles: list[Removable] = []
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if id(module.weight) in watched:
                handles.append(
                    module.register_forward_pre_hook(Hook(partial(_announce_lookup, callback)), with_kwargs=True)
                )
        elif isinstance(module, AnnouncesReads):
            handles.append(module.register_read_hook(Hook(callback)))
    return Hooks(handles)


def _announce_lookup(
    callback: ReadCallback, module: nn.Embedding | nn.EmbeddingBag, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tell what an embedding is about to look up, as its forward pre-hook."""
    ids = args[0] if args else kwargs.get("input")
    if not isinstance(ids, Tensor) or isinstance(ids, FakeTensor):
        return  # what is no tensor is for the module to refuse; a tensor without values reads nothing
    # What torch.func's transforms derive is of what is read of rows, not of how these came to be what they are.
    with nullcontext() if peek_interpreter_stack() is None else temporarily_clear_interpreter_stack():
        callback(module.weight, _plain_rows(ids))


def _plain_rows(ids: Tensor) -> Tensor:
    """Return all ids, int64 ``[num_ids]``, of a tensor that may be nested or a transform's own."""
    while is_functorch_wrapped_tensor(ids):
        ids = get_unwrapped(ids)
    if ids.is_nested:
        ids = ids.values() if ids.is_contiguous() else torch.cat([each.reshape(-1) for each in ids.unbind()])
    return ids.detach().reshape(-1).to(torch.int64)
