"""No time without a right result: each case is checked against PyTorch before it is measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moments import moment_dtype
from ..optimizer import SparseAdam
from .errors import BenchError
from .machine import fastest_backend
from .workload import Workload

_MAX_LOOKUPS = 4096
_LR = 1e-3
# Roundings of a few operations, twice over, in units of the last place of the largest value.
_ALLOWED_ROUNDINGS = 32


def verify(workload: Workload) -> None:
    """Compare steps of ours with :class:`torch.optim.SparseAdam` on a small copy of each table.

    The copy has the rows that the first lookups of the first gradient touch, and repeats them as these do. It is
    stepped twice, so that rows without moments are updated and rows with them.

    Raises:
        BenchError: the results differ by more than rounding.
    """
    for index in range(len(workload.tables)):
        _, rows = torch.unique(workload.gradients[0].rows[index][:_MAX_LOOKUPS], return_inverse=True)
        if not _agrees(rows.cpu(), workload.case.width, workload.case.dtype, workload.device):
            raise BenchError(
                f"case {workload.case.name} was not timed: a step of sparseadam does not agree with "
                "torch.optim.SparseAdam; please report this with the output of sparseadam.backends()."
            )


def _agrees(rows: Tensor, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    num_rows = int(rows.max()) + 1
    start = (torch.randn(num_rows, width, generator=generator) * _LR).to(dtype)
    # PyTorch sums and updates half-precision tables in half precision: its float32 result is the one to agree with.
    wide = moment_dtype(dtype)
    table, expected = nn.Parameter(start.to(device)), nn.Parameter(start.to(wide, copy=True))
    ours = SparseAdam([table], lr=_LR, torch_eps=True, backend=fastest_backend(device).name)
    theirs: torch.optim.Optimizer = torch.optim.SparseAdam([expected], lr=_LR)
    for _ in range(2):
        # Eighths: they add up without rounding, so that the order of summation cannot show.
        values = torch.randint(-8, 9, (len(rows), width), generator=generator) / 8
        sparse = torch.sparse_coo_tensor(rows[None], values.to(dtype), start.shape, check_invariants=True)
        table.grad = sparse.to(device)
        expected.grad = torch.sparse_coo_tensor(rows[None], values.to(wide), start.shape, check_invariants=True)
        ours.step()
        theirs.step()
    reference = theirs.state[expected]
    mine = {name: ours.state[table][name].cpu() for name in ("rows", "exp_avg", "exp_avg_sq")}
    return _is_close(table.detach().cpu().to(wide), expected.detach(), dtype) and all(
        _is_close(mine[name], reference[name][mine["rows"]], wide) for name in ("exp_avg", "exp_avg_sq")
    )


def _is_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    allowed = _ALLOWED_ROUNDINGS * torch.finfo(dtype).eps * wanted.abs().max()
    return bool(((found - wanted).abs() <= allowed).all())
