"""Tables in huge pages: what is moved there, what stays where it is, and that no number changes."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparseadam import SparseAdam, _huge_pages
from sparseadam.update import native

if sys.platform != "linux":
    pytest.skip("only Linux is asked for huge pages", allow_module_level=True)

HUGE = 2 << 20
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
ROWS, WIDTH = 100_000, 32  # 12.8 MB


def can_collapse() -> bool:
    """Try on memory of its own whether this system moves memory into huge pages."""
    settings = Path("/sys/kernel/mm/transparent_hugepage")
    if not settings.exists() or "[never]" in (settings / "enabled").read_text():
        return False
    if int((settings / "hpage_pmd_size").read_text()) != HUGE:
        return False
    memory = mmap.mmap(-1, 2 * HUGE, flags=PRIVATE)
    memory.write(b"x" * 2 * HUGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = -(-address // HUGE) * HUGE
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(HUGE), 25)


needs_huge_pages = pytest.mark.skipif(
    native.module() is None or not can_collapse(),
    reason="needs the native backend, and a system that moves memory into huge pages (Linux 6.1, not set to never)",
)


def mapped_kilobytes(tensor: torch.Tensor, name: str) -> int:
    """Return what the mapping that holds the middle of a tensor has of ``Rss`` or ``AnonHugePages``.

    The system counts mappings side by side as one.
    """
    middle = tensor.data_ptr() + tensor.nbytes // 2
    is_within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if "-" in first:
            begin, end = (int(address, 16) for address in first.split("-"))
            is_within = begin <= middle < end
        elif is_within and first == f"{name}:":
            return int(others[0])
    raise AssertionError("no mapping holds the tensor")


class Mapping:
    """Private memory, untouched."""

    def __init__(self, num_bytes: int) -> None:
        """Map so many bytes."""
        self.memory = mmap.mmap(-1, num_bytes, flags=PRIVATE)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.float32)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note what the system is asked to move, as if it agreed to all."""
    spans: list[tuple[int, int]] = []

    def note(span: _huge_pages.Span) -> int:
        spans.append((span.begin, span.end))
        return 0

    monkeypatch.setattr(_huge_pages, "_collapse", note)
    monkeypatch.setattr(_huge_pages, "_huge_page_bytes", lambda: HUGE)
    return spans


def step(optimizer: SparseAdam, table: torch.nn.Parameter) -> None:
    rows = torch.tensor([[3, ROWS - 1, 3]])
    table.grad = torch.sparse_coo_tensor(rows, torch.ones(3, WIDTH), table.shape, check_invariants=True)
    optimizer.step()


@needs_huge_pages
def test_a_table_is_in_huge_pages_after_its_first_step() -> None:
    mapping = Mapping(4 * ROWS * WIDTH)
    mapping.tensor.fill_(0.5)
    table = torch.nn.Parameter(mapping.tensor.view(ROWS, WIDTH))
    assert mapped_kilobytes(table, "AnonHugePages") == 0
    step(SparseAdam([table], backend="native"), table)
    assert mapped_kilobytes(table, "AnonHugePages") * 1024 >= table.nbytes - 2 * HUGE
    assert torch.equal(table[4:-1], torch.full((ROWS - 5, WIDTH), 0.5))


@needs_huge_pages
def test_pages_never_touched_stay_away() -> None:
    mapping = Mapping(8 * HUGE)
    mapping.tensor[: mapping.tensor.numel() // 2] = 1.0
    resident = mapped_kilobytes(mapping.tensor, "Rss")
    _huge_pages.move_into_huge_pages(mapping.tensor.data_ptr(), mapping.tensor.nbytes)
    assert mapped_kilobytes(mapping.tensor, "Rss") == resident
    assert mapped_kilobytes(mapping.tensor, "AnonHugePages") >= 3 * HUGE // 1024


def places(tensor: torch.Tensor, asked: list[tuple[int, int]]) -> Iterator[int]:
    """Yield which whole huge pages of a tensor were asked for, counted from its first one."""
    first = -(-tensor.data_ptr() // HUGE) * HUGE
    for begin, end in asked:
        assert begin % HUGE == end % HUGE == 0
        yield from range((begin - first) // HUGE, (end - first) // HUGE)


def test_only_whole_resident_pages_within_are_asked_for(asked: list[tuple[int, int]]) -> None:
    mapping = Mapping(82 * HUGE)  # more than is looked at at a time
    first = (-mapping.tensor.data_ptr() % HUGE) // 4
    tensor = mapping.tensor[first : first + 80 * HUGE // 4]
    tensor.fill_(1.0)
    hole = 40 * HUGE + mmap.PAGESIZE
    mapping.memory.madvise(mmap.MADV_DONTNEED, 4 * first + hole, mmap.PAGESIZE)
    inner = tensor[1:-1]  # the first and the last place are its own in part only
    _huge_pages.move_into_huge_pages(inner.data_ptr(), inner.nbytes)
    assert list(places(tensor, asked)) == [*range(1, 40), *range(41, 79)]


def test_memory_that_others_see_is_left_alone(asked: list[tuple[int, int]], tmp_path: Path) -> None:
    shared = torch.ones(4 * HUGE).share_memory_()  # type: ignore[no-untyped-call]
    _huge_pages.move_into_huge_pages(shared.data_ptr(), shared.nbytes)
    path = tmp_path / "table"
    path.write_bytes(b"x" * 4 * HUGE)
    with path.open("r+b") as file:
        private = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    private.add_(1)
    _huge_pages.move_into_huge_pages(private.data_ptr(), private.nbytes)
    assert asked == []


def test_small_tables_are_left_alone(asked: list[tuple[int, int]]) -> None:
    tensor = Mapping(3 * HUGE).tensor.fill_(1.0)
    _huge_pages.move_into_huge_pages(tensor.data_ptr(), (4 << 20) - 1)
    assert asked == []


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None], ids=["never", "no such kernel"])
def test_a_system_that_does_not_offer_them_is_not_asked(
    setting: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(span: _huge_pages.Span) -> int:
        raise AssertionError("asked")

    (tmp_path / "hpage_pmd_size").write_text(str(HUGE))
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(_huge_pages, "_collapse", refuse)
    monkeypatch.setattr(_huge_pages, "_SETTINGS", tmp_path)
    tensor = Mapping(4 * HUGE).tensor.fill_(1.0)
    _huge_pages.move_into_huge_pages(tensor.data_ptr(), tensor.nbytes)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    with pytest.raises(AssertionError, match="asked"):
        _huge_pages.move_into_huge_pages(tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize(("error", "num_asked"), [(errno.ENOMEM, 1), (errno.EAGAIN, 2)])
def test_a_system_without_huge_pages_left_is_asked_once(
    error: int, num_asked: int, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = _huge_pages._collapse
    monkeypatch.setattr(_huge_pages, "_collapse", lambda span: note(span) or error)
    tensor = Mapping(50 * HUGE).tensor.fill_(1.0)  # is looked at in two parts
    _huge_pages.move_into_huge_pages(tensor.data_ptr(), tensor.nbytes)
    assert len(asked) == num_asked


@pytest.mark.skipif(native.module() is None, reason="needs the native backend")
def test_each_memory_of_a_table_is_asked_for_once(asked: list[tuple[int, int]]) -> None:
    table = torch.nn.Parameter(torch.ones(ROWS, WIDTH))
    optimizer = SparseAdam([table], backend="native", nonfinite="error")
    for _ in range(3):
        step(optimizer, table)
    assert len(asked) == 1
    table.data = torch.ones(ROWS, WIDTH)
    step(optimizer, table)
    assert len(asked) == 2
    begin, end = asked[1]
    assert table.data_ptr() <= begin < end <= table.data_ptr() + table.nbytes


@pytest.mark.skipif(native.module() is None, reason="needs the native backend")
def test_columns_of_a_wider_tensor_are_asked_for_as_far_as_they_reach(asked: list[tuple[int, int]]) -> None:
    whole = torch.ones(ROWS, 2 * WIDTH)
    table = torch.nn.Parameter(whole[:, WIDTH:])
    step(SparseAdam([table], backend="native"), table)
    assert asked[0][0] >= table.data_ptr()
    assert whole.data_ptr() + whole.nbytes - HUGE < asked[-1][1] <= whole.data_ptr() + whole.nbytes
