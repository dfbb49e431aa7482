"""Summing repeated rows natively: the same rows and the same bits as the definition, for any number of threads."""

from __future__ import annotations

import pytest
import torch

from sparseadam import update
from sparseadam.moments import moment_dtype
from sparseadam.update import native, reference

pytestmark = pytest.mark.skipif(native.module() is None, reason="this installation has no native module")


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sparse_shape", "row_shape", "num_lookups"),
    [((40,), (7,), 300), ((3000,), (64,), 20_000), ((9, 5), (2, 3), 100), ((50_000,), (), 30_000), ((10,), (4,), 1)],
)
def test_native_sums_are_the_reference_sums(
    sparse_shape: tuple[int, ...],
    row_shape: tuple[int, ...],
    num_lookups: int,
    dtype: torch.dtype,
    num_threads: int,
    restore_threads: None,
) -> None:
    torch.manual_seed(num_lookups)
    torch.set_num_threads(num_threads)
    indices = torch.stack([torch.randint(size, (num_lookups,)) for size in sparse_shape])
    values = torch.randn(num_lookups, *row_shape).to(dtype)
    own = moment_dtype(dtype)
    assert native.can_coalesce(indices, values, sparse_shape, own)
    rows, sums = native.coalesce_rows(indices, values, sparse_shape, own)
    want_rows, want_sums = reference.coalesce_rows(indices, values, sparse_shape, own)
    assert torch.equal(rows, want_rows)
    assert torch.equal(sums, want_sums)


def test_what_native_code_cannot_sum_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "coalesce_rows", lambda *_: pytest.fail("not for native code"))
    indices, values = torch.tensor([[3, 1, 3]]), torch.ones(3, 2)
    rows, sums = update.coalesce_rows(indices, values, (4,), torch.float64)
    assert rows.tolist() == [1, 3] and sums.tolist() == [[1, 1], [2, 2]] and sums.dtype is torch.float64
