"""All that was measured, what is read from it, and the JSON file."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseadam.bench.machine import facts

from .runs import Run, Task, mean_of_last
from .small_changes import SmallChanges
from .steps import StepComparison
from .variants import BASELINE

SETTINGS_KEPT = ("dim", "epochs", "steps", "lr", "batch", "window", "negatives", "subsample", "min_count")


@dataclass(frozen=True)
class Results:
    """All measurements.

    Attributes:
        trained: runs from the start, all variants of a seed before the next seed's.
        continued: runs from the trained baseline, in the same order.
        untrained_losses: what the trained baseline's losses are on the batches of ``continued``, by seed and step.
        steps: the interleaved steps.
        small_changes: the half-precision tables whose updates are small.
    """

    trained: list[Run]
    continued: list[Run]
    untrained_losses: list[list[float]]
    steps: StepComparison
    small_changes: list[SmallChanges]


def by_variant(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs of each variant, in order of seeds."""
    return {name: [run for run in runs if run.variant == name] for name in dict.fromkeys(run.variant for run in runs)}


def loss_differences(runs: list[Run]) -> dict[str, list[float]]:
    """Return how much higher each variant's final loss is than the baseline's of the same seed, by seed."""
    found = by_variant(runs)
    return {
        name: [run.final_loss - base.final_loss for run, base in zip(those, found[BASELINE.name], strict=True)]
        for name, those in found.items()
    }


def correlation_differences(runs: list[Run]) -> dict[str, list[float]]:
    """Return the same of the correlation with WordSim-353; empty where it was not measured."""
    found = by_variant(runs)
    return {
        name: [
            run.correlation - base.correlation
            for run, base in zip(those, found[BASELINE.name], strict=True)
            if run.correlation is not None and base.correlation is not None
        ]
        for name, those in found.items()
    }


def gains(results: Results) -> dict[str, list[float]]:
    """Return by how much training on lowered each variant's final loss, by seed."""
    return {
        name: [
            mean_of_last(before) - run.final_loss for run, before in zip(those, results.untrained_losses, strict=True)
        ]
        for name, those in by_variant(results.continued).items()
    }


def step_ratio(steps: StepComparison, name: str) -> float:
    """Return how many times the baseline's time a step takes: the median of the rounds' ratios."""
    pairs = zip(steps.step_ms[name], steps.step_ms[BASELINE.name], strict=True)
    return statistics.median(own / base for own, base in pairs)


def write_json(results: Results, task: Task, path: Path) -> None:
    """Write everything but the losses of single steps, with where it was measured."""
    settings = {name: getattr(task.settings, name) for name in SETTINGS_KEPT}
    content: dict[str, Any] = {
        "origin": facts(),
        "corpus": {
            "file": task.settings.corpus.name,
            "words": len(task.corpus.rows),
            "vocabulary": len(task.corpus.vocabulary),
        },
        "settings": settings,
        "trained": [_record(run) for run in results.trained],
        "continued": [_record(run) for run in results.continued],
        "continued_gains": gains(results),
        "step_ms": {name: statistics.median(times) for name, times in results.steps.step_ms.items()},
        "step_ratio": {name: step_ratio(results.steps, name) for name in results.steps.step_ms},
        "moment_errors": {name: asdict(errors) for name, errors in results.steps.moment_errors.items()},
        "small_changes": [
            {"table": changes.name, "moved": changes.mean[-1], "low": changes.low[-1], "high": changes.high[-1]}
            for changes in results.small_changes
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _record(run: Run) -> dict[str, Any]:
    record = asdict(run)
    del record["losses"]
    return record | {"num_steps": len(run.losses), "final_loss": run.final_loss}
