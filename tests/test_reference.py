"""The reference backend where numbers cannot show it: shapes on the meta device, and the size of what a step makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseadam import SparseAdam, _validate
from sparseadam._validate import Place
from sparseadam.moments import Moments, moment_dtype
from sparseadam.update import RowUpdate, reference, step_scalars

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "bias_correction": "row", "weight_decay": 0.1, "weight_decay_mode": "exact"},
    {"second_moment": "row", "amsgrad": True, "torch_eps": True, "bias_correction": "row"},
    {"moment_dtype": torch.bfloat16, "second_moment": "row"},
    {"moment_dtype": torch.uint8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape, sparse_dim", [((30, 200), 1), ((5, 6, 3), 2), ((30, 2, 3), 1), ((7,), 1)])
def test_the_rule_for_known_slots_runs_on_meta(
    shape: tuple[int, ...], sparse_dim: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """What has no memory has no numbers: only shapes and dtypes that fit, and nothing that asks for a value."""
    meta = torch.device("meta")
    table = torch.empty(shape, dtype=dtype, device=meta)
    rounds = dtype in _validate.HALF_DTYPES
    optimizer = SparseAdam([Parameter(torch.ones(2, 2, dtype=dtype))], stochastic_rounding=rounds, **options)
    group = _validate.check_group(optimizer.param_groups[0], 0)
    moments = Moments(table.shape, sparse_dim, moment_dtype(dtype), meta, group.layout)
    moments.num_slots = 4
    moments.grow(4)
    before = {name: (part.shape, part.dtype) for name, part in moments.slot_parts().items()}
    rows, slots = (torch.empty(3, dtype=torch.int64, device=meta) for _ in range(2))
    summed = reference.SummedRows(rows, torch.empty((3, *shape[sparse_dim:]), dtype=moments.dtype, device=meta))
    nothing = torch.empty(0, device=meta)
    place = Place(optimizer.param_groups[0], 0, 0)
    update = RowUpdate(place, table, moments, nothing, nothing, 3, step_scalars(group, 1), rounds)
    reference.update_slots(update, slots, summed)
    assert {name: (part.shape, part.dtype) for name, part in moments.slot_parts().items()} == before
    assert (table.shape, table.dtype) == (shape, dtype)


class LargestMade(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, views of what was there and in-place results aside."""

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.num_elements = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if _is_strided(leaf)}
        for made in tree_leaves(result):
            if _is_strided(made) and made.untyped_storage().data_ptr() not in known:
                if made.numel() > self.num_elements:
                    self.num_elements, self.operation = made.numel(), str(func)
        return result


def _is_strided(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


@pytest.mark.parametrize("options", [*OPTIONS, {"nonfinite": "error"}, {"nonfinite": "skip"}], ids=str)
def test_a_step_makes_nothing_of_the_tables_size(options: dict[str, Any]) -> None:
    num_rows, width, num_lookups = 20_000, 3, 6
    table = Parameter(torch.ones(num_rows, width))
    optimizer = SparseAdam([table], backend="reference", **options)
    for number in range(3):
        rows = torch.tensor([[5, 7, 5, 19_999, number, 7]])
        values = torch.ones(num_lookups, width)
        table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)
        with LargestMade() as made:
            optimizer.step()
        if number > 0:  # the first step makes the index of all rows
            # Codes have the values of all 256 in a table, and a block for each row.
            assert 0 < made.num_elements <= max(256, num_lookups * 128), made.operation
