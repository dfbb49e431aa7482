"""What was measured as JSON lines, CSV and Markdown.

All of them are made from records, the JSON lines' contents, so that a table can be made again from a file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cases import FLOOR, FUSED_STEP, FUSED_WITH_GRADIENT, TORCH_SPARSE
from .measure import OURS, Result

Record = dict[str, Any]

MISSED = "MISSED"


def record_of(result: Result, facts: Mapping[str, Any]) -> Record:
    """Return a result and its origin as plain values."""
    case = result.case
    return {
        **facts,
        "case": case.name,
        "tables": case.num_tables,
        "rows": case.num_rows,
        "dim": case.width,
        "lookups": case.num_lookups,
        "distribution": case.distribution,
        "dtype": str(case.dtype).removeprefix("torch."),
        "touched": result.num_touched,
        "floor_bytes": result.floor_bytes,
        "rounds": result.num_rounds,
        "seconds": {name: spread._asdict() for name, spread in result.seconds.items()},
        "ratios": {name: spread._asdict() for name, spread in result.ratios.items()},
        "copy_bytes_per_second": result.bandwidth._asdict(),
        "state_bytes": result.state_bytes,
        "targets": dict(case.targets),
        "left_out": result.left_out,
    }


# Files --------------------------------------------------------------------------------------------


def write_json_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_json_lines(path: Path) -> list[Record]:
    """Read what :func:`write_json_lines` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write a record a row; nested values get columns like ``seconds.ours.median``."""
    rows = [_flatten(record) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


# Tables -------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table: its heading, what it means, and its cell for a record."""

    heading: str
    legend: str
    cell: Callable[[Record], str]


def figure(value: float) -> str:
    """Write a number with three digits, or with all of its whole ones."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread_figures(spread: Mapping[str, float], factor: float = 1.0) -> str:
    """Write a record's median and, in brackets, its spread, all multiplied by ``factor``."""
    median, low, high = (figure(factor * spread[name]) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _shape(record: Record) -> str:
    dtype = "" if record["dtype"] == "float32" else f" {record['dtype']}"
    return f"{record['tables']} x {record['rows']:,} x {record['dim']}{dtype}"


def _lookups(record: Record) -> str:
    return f"{record['lookups']:,} {Path(record['distribution']).name}"


def _milliseconds(record: Record) -> str:
    return spread_figures(record["seconds"][OURS], 1e3)


def _times(name: str) -> Callable[[Record], str]:
    return lambda record: _judged(record, name, lambda ratio: f"{figure(ratio)}x")


def _judged(record: Record, name: str, text: Callable[[float], str]) -> str:
    """Write a ratio and, where there is one, its target; a missed one says so."""
    if name not in record["ratios"]:
        return "left out"
    median = record["ratios"][name]["median"]
    target = record["targets"].get(name)
    if target is None:
        return text(median)
    return f"{text(median)} ({target:g})" if median >= target else f"{text(median)} ({MISSED} {target:g})"


COLUMNS = (
    Column("case", "name of the case", lambda record: str(record["case"])),
    Column("tables x rows x dim", "tables stepped at once, rows and elements of a row of each", _shape),
    Column("lookups", "lookups into each table in a step, and their distribution", _lookups),
    Column("touched", "distinct rows of a step, over all tables", lambda record: f"{record['touched']:,.0f}"),
    Column("ours, ms", "step() of sparseadam.SparseAdam: median (20th to 80th percentile)", _milliseconds),
    Column(
        "SparseAdam",
        "how many times faster than torch.optim.SparseAdam on the same uncoalesced gradient",
        _times(TORCH_SPARSE),
    ),
    Column("fused step", "how many times faster than step() of torch.optim.Adam(fused=True)", _times(FUSED_STEP)),
    Column("with gradient", "the same with the making of its dense gradient", _times(FUSED_WITH_GRADIENT)),
    Column(
        "of floor",
        "time to move, at the speed of a copy, the bytes that must move, as a share of ours",
        lambda record: _judged(record, FLOOR, lambda ratio: f"{ratio:.2f}"),
    ),
)

HOW = (
    "Medians of ratios taken within interleaved rounds, in steady state: all rows of the gradients have moments.",
    f"In brackets the target, where there is one; {MISSED}: it was not reached.",
)


def origin(record: Record) -> str:
    """Say in a line what was measured where."""
    commit = f" ({record['commit']})" if record["commit"] else ""
    device = record.get("device", "cpu")  # older files have none
    on_device = "" if device == "cpu" else f"on {device}, "
    return (
        f"sparseadam {record['sparseadam']}{commit}, backend {record['backend']} ({record['backend_detail']}), "
        f"{on_device}"
        f"torch {record['torch']}, Python {record['python']}, {record['processor']}, threads: {record['threads']}"
    )


def notes(records: Iterable[Record]) -> list[str]:
    """Say which contenders were left out, and why."""
    return [
        f"{record['case']}: {name} was left out: {reason}"
        for record in records
        for name, reason in record["left_out"].items()
    ]


def markdown_table(columns: Sequence[Column], records: Sequence[Record]) -> str:
    """Return a table in Markdown, what was missed in bold."""
    lines = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
    ]
    for record in records:
        cells = [column.cell(record) for column in columns]
        lines.append("| " + " | ".join(f"**{cell}**" if MISSED in cell else cell for cell in cells) + " |")
    return "\n".join(lines)
