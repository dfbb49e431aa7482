"""An installation without the native module: it says so once, and runs. ``make fallback`` makes one and runs this."""

from __future__ import annotations

import warnings

import pytest
import torch

import sparseadam
from sparseadam import SparseAdam

pytestmark = pytest.mark.skipif(
    any(backend.name == "native" and backend.available for backend in sparseadam.backends()),
    reason="the native module is here; make fallback builds an installation without it",
)


def test_the_backend_list_says_why_native_is_missing() -> None:
    native, _, reference = sparseadam.backends()
    assert (native.name, native.available) == ("native", False)
    assert "compiler" in native.detail
    assert reference.available


def test_it_says_once_that_it_is_slow_and_runs() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    with pytest.warns(UserWarning, match="slow reference backend"):
        optimizer = SparseAdam(table.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseAdam(table.parameters())
    before = table.weight.detach().clone()
    table(torch.tensor([3, 7, 3])).sum().backward()
    optimizer.step()
    assert (table.weight != before).any(dim=1).nonzero().flatten().tolist() == [3, 7]


def test_native_by_name_is_refused_with_the_reason() -> None:
    with pytest.raises(ImportError, match=r'backend="native" is not available: .* compiler'):
        SparseAdam([torch.zeros(3, 3)], backend="native")
