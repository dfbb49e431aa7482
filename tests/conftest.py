"""What several test files use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings

import sparseadam
from sparseadam.update import native

# make test-triton runs the tests of the Triton backend so, on the CPU: a step then takes some hundred times longer.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Tables of tests are on the CPU.
BACKENDS = [
    backend.name
    for backend in sparseadam.backends()
    if backend.available and (backend.name != "triton" or IS_INTERPRETED)
]

needs_steady_steps = pytest.mark.skipif(
    native.module() is None or native.module().steady_step(torch.Tensor) is None,
    reason="this torch or this installation has no steady steps; every step is a general one",
)


if IS_INTERPRETED:
    from triton.runtime import interpreter

    # For each launch, and for each call of a function within one, the interpreter rewrites Triton's language as the
    # function's module sees it, which takes more than half of the time of small kernels, and undoes it after a launch.
    # Here nobody else uses the language: once a module is enough.
    _rewrite_language = interpreter._patch_lang
    _rewritten: set[str] = set()

    def _rewrite_language_once(function: Callable[..., Any]) -> SimpleNamespace:
        if function.__module__ not in _rewritten:
            _rewrite_language(function)
            _rewritten.add(function.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = _rewrite_language_once


def num_examples(count: int) -> int:
    """How many examples a property that deserves ``count`` is tried on."""
    return max(5, count // 20) if IS_INTERPRETED else count


def many(count: int) -> int:
    """How many lookups a step deserves that is to be large: the interpreter adds those of a hot row one by one."""
    return max(300, count // 100) if IS_INTERPRETED else count


# The machine may be slow and shared, and the first example compiles nothing but imports much.
settings.register_profile("sparseadam", deadline=None, print_blob=True, max_examples=num_examples(100))
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
