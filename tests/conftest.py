"""What several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import sparseadam

BACKENDS = [backend.name for backend in sparseadam.backends() if backend.available]

# The machine may be slow and shared, and the first example compiles nothing but imports much.
settings.register_profile("sparseadam", deadline=None, print_blob=True)
settings.load_profile("sparseadam")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of this installation, by name."""
    return str(request.param)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Put torch's thread count back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep a module to one thread: steps this small only wait for a second one, long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
