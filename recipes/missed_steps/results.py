"""What was measured, kept as JSON lines, and what is read from it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparseadam.bench.machine import facts
from sparseadam.bench.report import Record, read_json_lines

from ..command_line import RecipeError
from .gaps import Gaps
from .methods import METHODS
from .runs import Run


@dataclass(frozen=True)
class Results:
    """All that is known of one task.

    Attributes:
        settings: of the task.
        runs: in the order in which they were made.
        gaps: of each table; empty where they were not counted.
    """

    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    gaps: list[Gaps] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.settings["name"])

    @property
    def metrics(self) -> list[str]:
        """What was judged, the one that decides first."""
        return list(self.runs[0].valid)

    def methods(self) -> list[str]:
        """Return the methods of which there are runs, dense Adam first."""
        return [method.name for method in METHODS if any(run.method == method.name for run in self.runs)]

    def rates(self) -> list[float]:
        """Return the learning rates of which there are runs, ascending."""
        return sorted({run.lr for run in self.runs})

    def find(self, method: str, lr: float, seed: int) -> Run | None:
        """Return that run, or None."""
        return next((run for run in self.runs if (run.method, run.lr, run.seed) == (method, lr, seed)), None)

    def best_rate(self, method: str) -> float:
        """Return the learning rate with the best judgement on the validation part, of the runs with seed 0."""
        candidates = [run for run in self.runs if run.method == method and run.seed == 0]
        return max(candidates, key=lambda run: run.valid[self.metrics[0]]).lr

    def at_best_rate(self, method: str) -> list[Run]:
        """Return the method's runs at its best learning rate, by seed."""
        best = self.best_rate(method)
        return sorted((run for run in self.runs if (run.method, run.lr) == (method, best)), key=lambda run: run.seed)


def relative_differences(run: Run, other: Run) -> list[float]:
    """Return by which share of ``other``'s the loss of ``run`` differs, with its sign, at each epoch."""
    return [own / theirs - 1 for own, theirs in zip(run.losses, other.losses, strict=True)]


def worst_difference(results: Results, method: str, baseline: str, lr: float) -> float | None:
    """Return the largest difference of the loss from the baseline's with the same rate and seed, at any epoch."""
    shares = [
        abs(share)
        for run in results.runs
        if (run.method, run.lr) == (method, lr) and (other := results.find(baseline, lr, run.seed)) is not None
        for share in relative_differences(run, other)
    ]
    return max(shares, default=None)


class ResultsFile:
    """JSON lines, one for each run and one for the gaps of each task; what is there need not be measured again.

    A line names the settings of its task. Those of a task with other settings, or other data, are another task's.
    """

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one.

        Raises:
            RecipeError: it cannot be read, or holds something else.
        """
        self._path = path
        self._tasks: dict[str, Results] = {}
        self.origins: list[Record] = []
        try:
            for record in read_json_lines(path) if path.exists() else []:
                self._keep(record)
        except OSError as error:
            raise RecipeError(f"cannot read {path}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path} holds something else than this recipe's results; move it away.") from error

    def __iter__(self) -> Iterator[Results]:
        """Yield the results of all tasks, as they come in the file."""
        return iter(self._tasks.values())

    def of(self, settings: Mapping[str, Any]) -> Results:
        """Return what is known of the task with these settings; it grows with what is added."""
        return self._tasks.setdefault(json.dumps(settings, sort_keys=True), Results(dict(settings)))

    def add_run(self, settings: Mapping[str, Any], run: Run) -> None:
        """Keep a run, in the file first."""
        self._write({"task": dict(settings), "run": asdict(run), "origin": facts()})

    def add_gaps(self, settings: Mapping[str, Any], gaps: Sequence[Gaps]) -> None:
        """Keep the gaps of all tables, in the file first."""
        self._write({"task": dict(settings), "gaps": [asdict(table) for table in gaps], "origin": facts()})

    def _write(self, record: Record) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RecipeError(f"cannot write to {self._path}: {error.strerror or error}.") from error
        self._keep(record)

    def _keep(self, record: Record) -> None:
        results = self.of(record["task"])
        if "run" in record:
            results.runs.append(Run(**record["run"]))
        else:
            results.gaps.extend(Gaps(**table) for table in record["gaps"])
        self.origins.append(record["origin"])
