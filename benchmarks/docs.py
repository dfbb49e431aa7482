"""Write ``docs/benchmarks.md`` and its plots: measure everything, or take what a previous run left in ``results``.

The prose is in ``benchmarks.md.in``; each ``{placeholder}`` there is filled with a table or a fact.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import contention
import memory
import options
import overhead
import replay
import scaling
import step_profile
import threads
import training
from common import RESULTS, Script

from sparseadam.bench import plot, report
from sparseadam.bench.report import Column, Record, markdown_table, read_json_lines

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
SCRIPTS: tuple[Script, ...] = tuple(
    module.SCRIPT
    for module in (training, scaling, overhead, options, replay, threads, contention, memory, step_profile)
)
# The table of steps, and the same taken once more, after all else: it shows how far a run repeats.
STEP = "step"
STEP_AGAIN = "step_again"
# The same two as another processor gave them, with `python -m sparseadam bench --json`: kept, not measured here.
STEP_ELSEWHERE = "step_elsewhere"
STEP_ELSEWHERE_AGAIN = "step_elsewhere_again"


def main() -> int:
    """Measure if asked to, and write the page."""
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md and its plots.")
    parser.add_argument(
        "--no-run", action="store_true", help="measure nothing; take the JSON lines in benchmarks/results as they are"
    )
    if not parser.parse_args().no_run:
        measure_everything()
    names = (STEP, STEP_AGAIN, STEP_ELSEWHERE, STEP_ELSEWHERE_AGAIN, *(script.name for script in SCRIPTS))
    missing = [name for name in names if not results_file(name).exists()]
    if missing:
        files = ", ".join(str(results_file(name).relative_to(HERE.parent)) for name in missing)
        print(f"docs: {files} not there; git has them, and all but step_elsewhere's a run writes.", file=sys.stderr)
        return 1
    write_page()
    return 0


def results_file(name: str) -> Path:
    """Return where a measurement's JSON lines are."""
    return RESULTS / f"{name}.jsonl"


def measure_everything() -> None:
    """Run each measurement in a process of its own, as a reader would."""
    RESULTS.mkdir(exist_ok=True)
    step, step_again = (["-m", "sparseadam", "bench", "--json", str(results_file(name))] for name in (STEP, STEP_AGAIN))
    scripts = [[str(HERE / f"{script.name}.py")] for script in SCRIPTS]
    for arguments in (step, *scripts, step_again):
        subprocess.run([sys.executable, *arguments], check=True)


def write_page() -> None:
    """Fill the template from the results and draw the plots."""
    images = DOCS / "images"
    images.mkdir(parents=True, exist_ok=True)
    steps = read_json_lines(results_file(STEP))
    plot.draw(steps, images / "benchmark-step.png")
    scaling.draw(read_json_lines(results_file(scaling.SCRIPT.name)), images / "benchmark-scaling.png")
    page = fill((HERE / "benchmarks.md.in").read_text(encoding="utf-8"), placeholders(steps))
    (DOCS / "benchmarks.md").write_text(page, encoding="utf-8")


def placeholders(steps: list[Record]) -> dict[str, str]:
    """Return what goes into the template, by name."""
    steps_again = read_json_lines(results_file(STEP_AGAIN))
    steps_elsewhere = read_json_lines(results_file(STEP_ELSEWHERE))
    steps_elsewhere_again = read_json_lines(results_file(STEP_ELSEWHERE_AGAIN))
    filled = {
        "machine": machine_table(steps[0]),
        "step": section(report.COLUMNS, steps),
        "notes": "\n".join(f"- {note}" for note in report.notes(steps)),
        "bandwidth": bandwidth(steps),
        "missed": missed(steps),
        STEP_AGAIN: once_more(steps_again, steps),
        "machine_elsewhere": machine_table(steps_elsewhere[0]),
        STEP_ELSEWHERE: markdown_table(report.COLUMNS, steps_elsewhere),
        "bandwidth_elsewhere": bandwidth(steps_elsewhere),
        "missed_elsewhere": missed(steps_elsewhere),
        STEP_ELSEWHERE_AGAIN: once_more(steps_elsewhere_again, steps_elsewhere),
    }
    for script in SCRIPTS:
        records = read_json_lines(results_file(script.name))
        filled[script.name] = section(script.columns, records) + apart(records[0], steps[0])
    return filled


def bandwidth(steps: list[Record]) -> str:
    """Say between what medians the copy's speed lay."""
    medians = [record["copy_bytes_per_second"]["median"] / 1e9 for record in steps]
    return f"{min(medians):.1f} to {max(medians):.1f} GB/s"


def machine_table(record: Record) -> str:
    """Say on what the figures were taken."""
    rows = {
        "processor": record["processor"],
        "threads": record["threads"],
        "backend": f"{record['backend']} ({record['backend_detail']})",
        "versions": f"sparseadam {record['sparseadam']}, torch {record['torch']}, Python {record['python']}",
        "commit": record["commit"] or "not a checkout",
        "date": record["date"],
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def apart(record: Record, steps: Record) -> str:
    """Say where a section was measured apart from the steps: times of two runs do not compare."""
    if record["commit"] == steps["commit"]:
        return ""
    return (
        f"\n\nMeasured apart from the steps above, at commit {record['commit']}, {record['date']}, perhaps on another "
        "machine of the same name: compare within this table only."
    )


def once_more(again: list[Record], steps: list[Record]) -> str:
    """Return the table of a run that repeats another, and what it missed."""
    return f"{markdown_table(report.COLUMNS, again)}{apart(again[0], steps[0])}\n\n{missed(again)}"


def section(columns: tuple[Column, ...], records: list[Record]) -> str:
    """Return a table and what its columns mean."""
    legend = "\n".join(f"- *{column.heading}*: {column.legend}." for column in columns)
    return f"{markdown_table(columns, records)}\n\n{legend}"


def missed(steps: list[Record]) -> str:
    """Say how many targets were missed, and in which cases."""
    cases = [
        f"{record['case']} (against {name.replace('_', ' ')})"
        for record in steps
        for name, target in record["targets"].items()
        if name in record["ratios"] and record["ratios"][name]["median"] < target
    ]
    return f"Targets missed: {', '.join(cases)}." if cases else "No target was missed."


def fill(template: str, values: dict[str, str]) -> str:
    """Replace each ``{name}`` of the template; a name that is not known is an error."""
    filled = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
    return re.sub(r"\n{3,}", "\n\n", filled)  # where a placeholder stands for nothing


if __name__ == "__main__":
    sys.exit(main())
