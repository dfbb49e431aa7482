"""The benchmark: what it asks, draws, computes and writes; that it runs, and nothing of how long anything takes."""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseadam import SparseAdam
from sparseadam.bench import cli, machine, measure, verify
from sparseadam.bench.cases import (
    CASES,
    FLOOR,
    FUSED_STEP,
    FUSED_WITH_GRADIENT,
    TORCH_SPARSE,
    ZIPF_EXPONENT,
    Case,
    row_source,
)
from sparseadam.bench.cli import main, parse_arguments
from sparseadam.bench.clock import laps
from sparseadam.bench.errors import BenchError, UsageError
from sparseadam.bench.measure import COPY, OURS, PEERS_TABLES, Rounds, Seconds, percentile, ratios_to_ours, spread_of
from sparseadam.bench.report import COLUMNS, MISSED, markdown_table, notes, origin, read_json_lines, record_of
from sparseadam.bench.terminal import TerminalTable
from sparseadam.bench.workload import NUM_GRADIENTS, Workload, floor_bytes
from sparseadam.update import Backend

pytestmark = pytest.mark.usefixtures("restore_threads")

TINY = ["bench", "--rows", "50", "--dim", "3", "--lookups", "20", "--rounds", "2", "--threads", "1"]
COMPARISONS = {TORCH_SPARSE, FUSED_STEP, FUSED_WITH_GRADIENT, FLOOR}


NO_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")


# From the command line ----------------------------------------------------------------------------


def test_own_case_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    json_path, csv_path, plot_path = (tmp_path / name for name in ("out.jsonl", "out.csv", "out.png"))
    files = ["--json", str(json_path), "--csv", str(csv_path), "--plot", str(plot_path)]
    assert main([*TINY, "--tables", "2", *files]) == 0

    shown = capsys.readouterr().out
    assert "2 x 50 x 3" in shown
    assert "20 zipf" in shown
    assert "backend" in shown
    for column in COLUMNS:
        assert f"{column.heading} " in shown
        assert column.legend in shown

    (record,) = read_json_lines(json_path)
    assert (record["tables"], record["rows"], record["dim"], record["lookups"]) == (2, 50, 3, 20)
    assert (record["distribution"], record["dtype"], record["threads"], record["rounds"]) == ("zipf", "float32", 1, 2)
    assert {"date", "commit", "sparseadam", "python", "torch", "processor", "backend_detail"} <= record.keys()
    assert record["ratios"].keys() == COMPARISONS
    assert record["seconds"].keys() == COMPARISONS | {OURS}
    for spread in (*record["ratios"].values(), *record["seconds"].values(), record["copy_bytes_per_second"]):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    # Moments of the whole table, of which PyTorch's Adam has its step besides.
    assert record["state_bytes"][TORCH_SPARSE] == 2 * 2 * 50 * 3 * 4
    assert record["state_bytes"]["fused_adam"] == 2 * (2 * 50 * 3 * 4 + 4)
    assert record["state_bytes"][OURS] > 0
    assert record["left_out"] == {}

    with csv_path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["seconds.ours.median"]) == record["seconds"][OURS]["median"]
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "sparseadam", *TINY, "--distribution", "uniform", "--json", "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 uniform" in done.stdout
    assert json.loads((tmp_path / "out.jsonl").read_text())["case"] == "own"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["race"], "invalid choice: 'race'"),
        (["bench", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["bench", "--rows", "many"], "argument --rows: 'many' is not a whole number"),
        (["bench", "--rows", "0"], "argument --rows: 0 does not lie in [1, "),
        (["bench", "--dim", "-1"], "argument --dim: -1 does not lie in [1, "),
        (["bench", "--lookups", "0"], "argument --lookups: 0 does not lie in [1, "),
        (["bench", "--tables", "1.5"], "argument --tables: '1.5' is not a whole number"),
        (["bench", "--threads", "0"], "argument --threads: 0 does not lie in [1, "),
        (["bench", "--rounds", "0"], "argument --rounds: 0 does not lie in [1, "),
        (["bench", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["bench", "--case", "huge"], "argument --case: invalid choice: 'huge'"),
        (["bench", "--case", "zipf", "--dim", "8"], "--case cannot be combined with --dim"),
        (["bench", "--plot", "plot.jpg"], "argument --plot: 'plot.jpg' does not end in .png"),
        (["bench", "--json", "no/such/place.jsonl"], "cannot write to no/such/place.jsonl: No such file or directory"),
        (["bench", "--csv", "."], "cannot write to .: Is a directory"),
        (["bench", "--distribution", "no/such/file"], "cannot read the row numbers in no/such/file: No such file"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("sparseadam: ")
    assert sentence in shown.err
    assert shown.err.endswith(".\n")
    assert shown.err.count("\n") == 1


@NO_DEVICE
def test_a_device_that_is_not_there_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main([*TINY, "--device", "cuda"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("sparseadam: PyTorch finds no CUDA or ROCm device; ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")])
def test_too_little_memory_gets_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(cli, "measure", lambda *_, **__: raise_it(error))
    assert main(TINY) == 1
    assert capsys.readouterr().err.endswith("sparseadam: there is not enough memory for case own.\n")


def test_an_error_of_ours_is_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(cli, "measure", lambda *_, **__: raise_it(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        main(TINY)


@pytest.mark.parametrize("flag", ["--json", "--csv", "--plot"])
def test_a_file_that_takes_nothing_gets_a_sentence(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It could be opened when the measurement began, and the disk is full when it ends."""
    for module in ("rich", "matplotlib"):
        pytest.importorskip(module)
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    assert main([*TINY, flag, str(full)]) == 1
    assert capsys.readouterr().err.endswith(f"sparseadam: cannot write to {full}: No space left on device.\n")


def test_an_interrupt_is_said_and_has_the_shells_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(cli, "measure", lambda *_, **__: raise_it(KeyboardInterrupt()))
    assert main(TINY) == 130
    assert capsys.readouterr().err.endswith("sparseadam: stopped.\n")


def raise_it(error: BaseException) -> None:
    raise error


def test_files_are_as_they_were_until_there_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("of another run")
    parse_arguments(["bench", "--json", str(path)])
    assert path.read_text() == "of another run"


class FakeEvent:
    """A device whose clock goes one millisecond for each event that is recorded, and ten for each part that runs."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        """Not recorded yet."""
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        """Take the time."""
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds from here to there."""
        assert min(self.at, end.at) >= 0
        return end.at - self.at


def test_times_on_a_device_are_taken_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between events, from a device that has nothing to do to one that has done all."""
    calls = []

    def run(name: str) -> None:
        calls.append(name)
        FakeEvent.now += 10

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    seconds = laps(torch.device("cuda"), lambda: run("first"), lambda: run("second"))
    assert seconds == pytest.approx([0.011, 0.011])
    assert calls == ["synchronize", "first", "second", "synchronize"]


def test_what_is_measured_on_a_device_is_the_backend_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("native", "triton", "reference")
    monkeypatch.setattr(machine, "backends", lambda: [Backend(name, True, name) for name in names])
    assert machine.fastest_backend(torch.device("cuda")).name == "triton"
    assert machine.fastest_backend().name == "native"
    without = [Backend(name, name == "reference", name) for name in names]
    monkeypatch.setattr(machine, "backends", lambda: without)
    assert machine.fastest_backend(torch.device("cuda")).name == "reference"
    # Triton's interpreter on the CPU is for checks and never measured.
    monkeypatch.setattr(machine, "backends", lambda: [Backend(name, name != "native", name) for name in names])
    assert machine.fastest_backend().name == "reference"


def test_where_a_device_was_measured_it_is_named_and_held_to_no_aim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    record = {**machine.facts(torch.device("cuda")), "case": "zipf"}
    assert "on a card, CUDA 13.0, " in origin(record)
    assert "on a card" not in origin(machine.facts())
    measured = []
    monkeypatch.setattr(cli, "measure", lambda case, *_, device: measured.append((case, device)))
    for name in ("cpu", "cuda"):
        cli._measure(CASES[0], 1, lambda share: None, torch.device(name))
    assert measured[0] == (CASES[0], torch.device("cpu")) and CASES[0].targets
    assert measured[1][0].targets == {} and measured[1][1] == torch.device("cuda")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b" \n", "holds no row numbers"),
        (b"3 x 4", "holds 'x' at place 2, which is not a row number."),
        (b"3 50", "names row 50 at place 2, but the table has rows 0 to 49; pass --rows"),
        (b"-1", "names row -1 at place 1, but the table has rows 0 to 49"),
        (b"\xff\xfe\x80", "is not a text file"),
    ],
)
def test_bad_files_get_a_sentence(
    content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    assert main([*TINY, "--distribution", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"sparseadam: {path} {sentence}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(("missing", "flags"), [("rich", []), ("matplotlib", ["--plot", "plot.png"])])
def test_missing_dependencies_are_named(
    missing: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, *flags]) == 1
    assert capsys.readouterr().err == (
        f"sparseadam: this needs {missing}, which is not installed; run pip install rich matplotlib.\n"
    )


@pytest.mark.parametrize("width", [180, 160, 120, 80, 40])
def test_a_narrow_terminal_breaks_no_figure(width: int) -> None:
    rich_console = pytest.importorskip("rich.console")
    # Of the files there, one that no run on this machine writes anew.
    records = read_json_lines(Path(__file__).parent.parent / "benchmarks" / "results" / "step_elsewhere.jsonl")
    console = rich_console.Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(TerminalTable(COLUMNS, records, "A step"))
    title, *lines = capture.get().splitlines()
    assert title.strip() == "A step"
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for record in records:
        for column in COLUMNS:
            assert set(column.cell(record).split()) <= set(words)
    # A line a record, where that is possible.
    assert ("case" in next(line for line in lines if "lookups" in line)) == (width >= 160)


def test_the_table_of_cases_is_measured_unless_something_else_is_asked_for() -> None:
    assert parse_arguments(["bench"]).cases == list(CASES)
    chosen = parse_arguments(["bench", "--case", "big", "--case", "seed", "--case", "big"]).cases
    assert [case.name for case in chosen] == ["big", "seed"]
    (own,) = parse_arguments(["bench", "--dtype", "bfloat16", "--dim", "5"]).cases
    assert own == Case("own", 1, 1_000_000, 5, 65_536, "zipf", torch.bfloat16)


# What is drawn ------------------------------------------------------------------------------------


def test_zipf_has_its_exponent_over_a_permutation_of_the_rows() -> None:
    num_rows, count = 100, 200_000
    rows = row_source("zipf", num_rows, seed=3)(count)
    assert int(rows.min()) >= 0
    frequencies = torch.bincount(rows, minlength=num_rows).sort(descending=True).values / count
    expected = torch.arange(1, num_rows + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
    expected /= expected.sum()
    # Five standard deviations of a binomial share, the largest of which is at the first rank.
    assert torch.allclose(frequencies.double(), expected, rtol=0, atol=5 * (0.25 / count) ** 0.5)
    most_frequent = rows.bincount(minlength=num_rows).argsort(descending=True)[:10]
    assert most_frequent.tolist() != sorted(most_frequent.tolist())


def test_uniform_draws_every_row_alike() -> None:
    counts = torch.bincount(row_source("uniform", 20, seed=0)(20_000))
    assert len(counts) == 20
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("distribution", ["zipf", "uniform"])
def test_the_same_seed_draws_the_same_rows(distribution: str) -> None:
    first, again, other = (row_source(distribution, 1000, seed)(50) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_file_is_taken_in_order_and_wraps_around(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("5 1\n1\t7  0\n")
    draw = row_source(str(path), 8, seed=0)
    assert draw(3).tolist() == [5, 1, 1]
    assert draw(4).tolist() == [7, 0, 5, 1]
    assert draw(11).tolist() == [1, 7, 0, 5, 1, 1, 7, 0, 5, 1, 1]


def test_gradients_are_distinct_uncoalesced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("4 4 2")
    workload = Workload(Case("own", 2, 6, 5, 3, str(path)))
    assert len(workload.gradients) == NUM_GRADIENTS
    for number, gradient in enumerate(workload.gradients):
        assert workload.give_gradients(number) is gradient
        given = [table.grad for table in workload.tables if table.grad is not None]
        assert [sparse.is_coalesced() for sparse in given] == [False, False]
        assert [sparse._indices()[0].tolist() for sparse in given] == [[4, 4, 2]] * 2
        assert all(torch.equal(sparse._values(), values) for sparse, values in zip(given, gradient.values, strict=True))
        workload.give_gradients(number)
        assert all(table.grad is not sparse for table, sparse in zip(workload.tables, given, strict=True))
        assert gradient.num_touched == 2 * 2
        assert gradient.floor_bytes == 2 * floor_bytes(2, 3, 5, torch.float32)
    first, second = (gradient.values[0] for gradient in workload.gradients[:2])
    assert not torch.equal(first, second)


# What is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # 3 touched rows, 5 lookups, width 2: table read and written, two moments read and written, values read.
        (torch.float32, 3 * 2 * (4 + 4 + 8 + 8) + 5 * 2 * 4),
        (torch.float64, 3 * 2 * (8 + 8 + 16 + 16) + 5 * 2 * 8),
        (torch.bfloat16, 3 * 2 * (2 + 2 + 8 + 8) + 5 * 2 * 2),
        (torch.float16, 3 * 2 * (2 + 2 + 8 + 8) + 5 * 2 * 2),
    ],
)
def test_floor_counts_the_bytes_that_must_move(dtype: torch.dtype, expected: int) -> None:
    assert floor_bytes(num_touched=3, num_lookups=5, width=2, dtype=dtype) == expected


def test_percentiles_lie_between_values_in_proportion() -> None:
    values = [50.0, 10.0, 40.0, 20.0, 30.0, 60.0]
    assert [percentile(values, percent) for percent in (0, 20, 50, 80, 100)] == [10, 20, 35, 50, 60]
    assert percentile([1.0, 2.0], 20) == pytest.approx(1.2)
    assert spread_of([7.0]) == (7.0, 7.0, 7.0)
    assert spread_of(values) == (35, 20, 50)


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that is ten times slower in one round moves neither the median ratio nor its percentiles."""
    rounds = [{OURS: 2.0, TORCH_SPARSE: 20.0}, {OURS: 20.0, TORCH_SPARSE: 200.0}, {OURS: 1.0, TORCH_SPARSE: 10.0}]
    assert ratios_to_ours(rounds) == {TORCH_SPARSE: (10.0, 10.0, 10.0)}


class Recorder:
    """A contender that takes the time it is told and notes when it stepped."""

    warm_up_steps = 4

    def __init__(self, name: str, seconds: float, log: list[tuple[str, int]]) -> None:
        """Take part as ``name``."""
        self.name, self.seconds, self.log = name, seconds, log

    def step(self, number: int) -> Seconds:
        """Note the step."""
        self.log.append((self.name, number))
        return {self.name: self.seconds}


def test_rounds_give_everyone_a_turn_in_changing_order() -> None:
    log: list[tuple[str, int]] = []
    rounds = Rounds([Recorder(name, 1.0, log) for name in "abc"])
    assert log == [(name, number) for name in "abc" for number in range(4)]
    orders = []
    for number in range(6):
        log.clear()
        assert rounds.take() == {"a": 1.0, "b": 1.0, "c": 1.0}
        assert {step for _, step in log} == {number}
        orders.append("".join(name for name, _ in log))
    assert orders == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_short_steps_are_repeated_over_all_gradients_alike() -> None:
    log: list[tuple[str, int]] = []
    Rounds([Recorder("short", 1e-4, log)]).take()
    assert len(log) - Recorder.warm_up_steps == 2 * NUM_GRADIENTS


def test_commit_names_the_code_whatever_was_measured_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "src" / "sparseadam" / "bench" / "machine.py"
    figures = tmp_path / "benchmarks" / "results" / "step.jsonl"
    for file in (code, figures):
        file.parent.mkdir(parents=True)
        file.write_text("as committed")
    monkeypatch.setattr(machine, "__file__", str(code))

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=Someone", "-c", "user.email=someone@example.com")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert machine.commit() is None  # nothing is committed yet
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert machine.commit() == head
    figures.write_text("measured anew")
    assert machine.commit() == head
    code.write_text("changed")
    assert machine.commit() == f"{head}-dirty"


def test_floor_is_the_bytes_at_the_speed_of_the_copy() -> None:
    workload = Workload(Case("own", 1, 6, 5, 3, "uniform", targets={TORCH_SPARSE: 4, FLOOR: 0.5}))
    copy_seconds = 2.0
    floor = copy_seconds * sum(gradient.floor_bytes for gradient in workload.gradients) / NUM_GRADIENTS / (2 * 2**28)
    rounds = [{OURS: 4 * floor, TORCH_SPARSE: 12 * floor, COPY: copy_seconds}] * 3
    result = measure.summarize(workload, rounds, {OURS: 1}, {FUSED_STEP: "it needs more memory"})
    assert result.seconds[FLOOR].median == pytest.approx(floor)
    assert result.bandwidth.median == 2**28
    assert result.ratios[FLOOR].median == pytest.approx(0.25)

    record = record_of(result, {"commit": None})
    row = markdown_table(COLUMNS, [record]).splitlines()[-1]
    assert f"**3x ({MISSED} 4)**" in row
    assert f"**0.25 ({MISSED} 0.5)**" in row
    assert "| left out |" in row
    assert notes([record]) == [f"own: {FUSED_STEP} was left out: it needs more memory"]
    record["targets"] = {TORCH_SPARSE: 3}
    assert "| 3x (3) |" in markdown_table(COLUMNS, [record])


# What protects a measurement ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_case_is_verified(dtype: torch.dtype) -> None:
    verify.verify(Workload(Case("own", 2, 40, 7, 100, "zipf", dtype)))


@pytest.mark.parametrize("wrong", [{"lr": 1.0001e-3}, {"betas": (0.9, 0.9991)}, {"maximize": True}], ids=str)
def test_a_wrong_result_is_not_timed(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(params: list[torch.Tensor], **options: object) -> SparseAdam:
        return SparseAdam(params, **{**options, **wrong})

    monkeypatch.setattr(verify, "SparseAdam", build)
    with pytest.raises(BenchError, match="case own was not timed: a step of sparseadam does not agree"):
        measure.measure(Case("own", 1, 40, 7, 100, "zipf"), num_rounds=1)


def test_contenders_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("own", 1, 1000, 8, 10, "uniform")
    needs = measure.memory_needs(case)
    for_ours = needs[OURS] + (1 << 30)
    monkeypatch.setattr(measure, "available_bytes", lambda _: for_ours - 1)
    with pytest.raises(BenchError, match=r"case own needs 1\.6 GB of memory and 1\.6 GB are available; pass a smaller"):
        measure.measure(case)
    monkeypatch.setattr(measure, "available_bytes", lambda _: for_ours + needs[PEERS_TABLES] + needs[TORCH_SPARSE])
    torch.set_num_threads(1)
    result = measure.measure(case, num_rounds=1)
    assert result.left_out.keys() == {FUSED_STEP, FUSED_WITH_GRADIENT}
    assert result.ratios.keys() == {TORCH_SPARSE, FLOOR}
    assert "needs 0.0 GB of memory more" in result.left_out[FUSED_STEP]


def test_contenders_without_operations_for_the_dtype_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError('"coalesce" not implemented for this dtype\nand more')

    monkeypatch.setattr(torch.optim.SparseAdam, "step", refuse)
    monkeypatch.setattr(measure, "verify", lambda workload: None)
    torch.set_num_threads(1)
    result = measure.measure(Case("own", 1, 10, 2, 5, "uniform"), num_rounds=1)
    assert result.left_out == {TORCH_SPARSE: '"coalesce" not implemented for this dtype'}
    assert result.ratios.keys() == {FUSED_STEP, FUSED_WITH_GRADIENT, FLOOR}


def test_the_garbage_collector_is_back_on_after_a_failure() -> None:
    class Failing(Recorder):
        def step(self, number: int) -> Seconds:
            """Fail while the collector is off."""
            assert not gc.isenabled()
            raise UsageError("no")

    with pytest.raises(UsageError):
        measure.take_rounds([Failing("failing", 1.0, [])], 1)
    assert gc.isenabled()
