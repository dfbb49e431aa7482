"""All that an optimizer holds, as plain values that can be compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def bits(value: Any) -> Any:
    """Return a tensor as its dtype, shape and bytes, any other value as its type and text; NaN equals itself so."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, repr(value)
    flat = value.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return value.dtype, tuple(value.shape), flat.numpy().tobytes()


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return every parameter, every part of every state and every option of every group."""
    return {
        "tables": [[bits(table) for table in group["params"]] for group in optimizer.param_groups],
        "states": [[state_bits(optimizer, table) for table in group["params"]] for group in optimizer.param_groups],
        "options": [
            {key: bits(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
        "number of states": len(optimizer.state),
    }


def state_bits(optimizer: torch.optim.Optimizer, table: torch.Tensor) -> dict[str, Any] | None:
    """Return every part of a table's state, or None where it has none; makes none, as ``state[table]`` would."""
    state: Mapping[str, Any] | None = optimizer.state.get(table)
    return None if state is None else {key: bits(value) for key, value in state.items()}
