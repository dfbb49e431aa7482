"""Sparse gradients as a backward pass leaves them: uncoalesced, with lookups in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def coo(indices: Any, values: Any, shape: Sequence[int], dtype: torch.dtype | None = None, **flags: bool) -> Tensor:
    """Return a gradient; ``indices`` are rows, or ``[sparse_dim, num_lookups]``."""
    indices = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
    indices = indices[None] if indices.dim() == 1 else indices
    values = torch.as_tensor(values, dtype=dtype)
    return torch.sparse_coo_tensor(indices, values, tuple(shape), **{"check_invariants": True, **flags})


def raw(indices: Any, values: Tensor, shape: Sequence[int], **flags: bool) -> Tensor:
    """Return a gradient as it is given, right or wrong."""
    indices = torch.as_tensor(indices)
    return torch.sparse_coo_tensor(indices, values, tuple(shape), **{"check_invariants": False, **flags})


def coo_of(indices: Any, values: Any, table: Tensor) -> Tensor:
    """Return a gradient of a table, in its shape and dtype."""
    return coo(indices, values, table.shape, table.dtype)
