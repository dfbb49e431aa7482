"""What was found, as tables: for the terminal and in Markdown."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from sparseadam.bench.report import Column, markdown_table
from sparseadam.bench.terminal import TerminalTable

from .methods import DENSE
from .results import Results, worst_difference

NOT_MEASURED = "none"


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Attributes:
        title: one line on what it shows.
        rows: each a mapping of heading to cell; all have the same headings in the same order.
    """

    title: str
    rows: list[dict[str, str]]

    def to_terminal(self) -> TerminalTable:
        """Return it for the terminal."""
        return TerminalTable(self._columns(), self.rows, self.title)

    def to_markdown(self) -> str:
        """Return it in Markdown, without the title."""
        return markdown_table(self._columns(), self.rows)

    def _columns(self) -> list[Column]:
        return [Column(heading, "", itemgetter(heading)) for heading in self.rows[0]]


def build_sheets(all_results: Sequence[Results]) -> list[Sheet]:
    """Return all tables that have a row, in the order in which they are read."""
    sheets = [gap_sheet(all_results), *map(ranking_sheet, all_results), loss_sheet(all_results)]
    return [sheet for sheet in sheets if sheet.rows]


def gap_sheet(all_results: Sequence[Results]) -> Sheet:
    """Return how many steps the rows that a step touches have missed since they were last touched."""
    return Sheet(
        "Steps that a touched row has missed since its last touch",
        [
            {
                "task, table": f"{results.name}, {table.table}",
                "rows": f"{table.num_rows:,}",
                "touched in a step": f"{table.touched_share:.1%}",
                "median gap": f"{table.median:g}",
                "mean": f"{table.mean:.1f}",
                "nine tenths, at most": f"{table.ninth_decile:g}",
                "largest": f"{table.largest:,}",
            }
            for results in all_results
            for table in results.gaps
        ],
    )


def ranking_sheet(results: Results) -> Sheet:
    """Return each method's judgement on the test part, at the learning rate that is best on the validation part."""
    decisive = results.metrics[0]
    dense_runs = {run.seed: run for run in results.at_best_rate(DENSE.name)}
    rows = []
    for method in results.methods():
        runs = results.at_best_rate(method)
        row = {
            results.name: method,
            "best rate": f"{runs[0].lr:g}",
            f"valid {decisive}": _spread([run.valid[decisive] for run in runs], ".4f"),
        }
        for metric in results.metrics:
            row[f"test {metric}"] = _spread([run.test[metric] for run in runs], ".4f")
            differences = [
                run.test[metric] - dense_runs[run.seed].test[metric] for run in runs if run.seed in dense_runs
            ]
            row[f"{metric} above dense's"] = "" if method == DENSE.name else _spread(differences, "+.4f")
        row["epoch, s"] = f"{min(run.seconds for run in results.runs if run.method == method):.2f}"
        rows.append(row)
    return Sheet(
        f"{results.name}: ranking at each method's best learning rate, seeds: {len(dense_runs)}; mean ± half the "
        "range, differences at the same seed, time in the fastest run",
        rows,
    )


def loss_sheet(all_results: Sequence[Results]) -> Sheet:
    """Return how far the loss of an epoch is from dense Adam's, at most, at each learning rate."""
    rates = sorted({lr for results in all_results for lr in results.rates()})
    return Sheet(
        "Largest relative difference of an epoch's training loss from dense Adam's with the same learning rate and "
        "seed, by learning rate",
        [
            {"task, method": f"{results.name}, {method}"}
            | {f"{lr:g}": _share(worst_difference(results, method, DENSE.name, lr)) for lr in rates}
            for results in all_results
            for method in results.methods()
            if method != DENSE.name
        ],
    )


def _share(worst: float | None) -> str:
    if worst is None:
        return NOT_MEASURED
    return f"{worst:.1%}" if worst >= 0.001 else f"{100 * worst:.0e} %"


def _spread(values: list[float], form: str) -> str:
    """Write a mean and, where there are several values, half their range."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"
