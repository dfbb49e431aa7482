"""Step time at fixed lookups as the table grows: only caches and page walks should make it longer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Script, add_rounds_flag, run

from sparseadam.bench.cases import TORCH_SPARSE, Case
from sparseadam.bench.machine import facts
from sparseadam.bench.measure import OURS, measure
from sparseadam.bench.report import Column, Record, figure, record_of, spread_figures

LOOKUPS, WIDTH = 16_384, 16
STYLES = {
    (OURS, "zipf"): ("sparseadam, Zipf", "#1f5fa8", "-"),
    (OURS, "uniform"): ("sparseadam, uniform", "#1f5fa8", "--"),
    (TORCH_SPARSE, "zipf"): ("torch.optim.SparseAdam, Zipf", "#b3402a", "-"),
    (TORCH_SPARSE, "uniform"): ("torch.optim.SparseAdam, uniform", "#b3402a", "--"),
}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--largest", type=int, default=8, help="rows of the largest table, as a power of ten")
    add_rounds_flag(parser)


def _measure(options: argparse.Namespace) -> Iterator[Record]:
    for exponent in range(4, options.largest + 1):
        for distribution in ("zipf", "uniform"):
            case = Case(f"10^{exponent} {distribution}", 1, 10**exponent, WIDTH, LOOKUPS, distribution)
            yield record_of(measure(case, options.rounds, with_dense=False), facts())


def _milliseconds(record: Record, name: str) -> str:
    if name not in record["seconds"]:
        return "left out"
    return spread_figures(record["seconds"][name], 1e3)


COLUMNS = (
    Column("rows", f"of a table {WIDTH} wide", lambda record: f"{record['rows']:,}"),
    Column("distribution", f"of {LOOKUPS:,} lookups", lambda record: str(record["distribution"])),
    Column("touched", "distinct rows of a step", lambda record: f"{record['touched']:,.0f}"),
    Column("ours, ms", "median (20th to 80th percentile)", lambda record: _milliseconds(record, OURS)),
    Column(
        "ours, ns a touched row",
        "the median over the rows touched",
        lambda record: figure(1e9 * record["seconds"][OURS]["median"] / record["touched"]),
    ),
    Column("torch.optim.SparseAdam, ms", "the same of PyTorch's", lambda record: _milliseconds(record, TORCH_SPARSE)),
)


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw step time over rows to a PNG file."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for (name, distribution), (label, color, line) in STYLES.items():
        chosen = [r for r in records if r["distribution"] == distribution and name in r["seconds"]]
        rows = [record["rows"] for record in chosen]
        spreads = [record["seconds"][name] for record in chosen]
        medians, low, high = ([1e3 * spread[key] for spread in spreads] for key in ("median", "low", "high"))
        axes.plot(rows, medians, color=color, linestyle=line, marker="o", markersize=4, label=label)
        axes.fill_between(rows, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=f"rows of a table {WIDTH} wide", ylabel="step(), ms")
    axes.set_title(f"{LOOKUPS:,} lookups in tables of every size")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    picture.savefig(path, dpi=130)


SCRIPT = Script("scaling", f"Step time at {LOOKUPS:,} lookups by rows of the table", _measure, COLUMNS, _add_flags)

if __name__ == "__main__":
    sys.exit(run(SCRIPT))
