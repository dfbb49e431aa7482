"""One picture: what each variant costs and saves, and what small changes do to half-precision tables."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from scipy.ndimage import uniform_filter1d

from .results import Results, by_variant, correlation_differences, loss_differences
from .small_changes import STEP_IN_SPACINGS, SmallChanges

DOTS_PER_INCH = 130
SMOOTHED_SHARE = 0.1  # of a curve of losses
# Dark enough to read on white.
PALETTE = "#4d4d4d #b3202c #1f5fa8 #e08a1e #2a7a2a".split()


def draw(results: Results, path: Path) -> None:
    """Draw all measurements to a PNG file."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1)
    _draw_variants(above, results)
    continued_axes, changes_axes = below.subplots(1, 2)
    _draw_continued(continued_axes, results)
    _draw_small_changes(changes_axes, results.small_changes)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_variants(figure: SubFigure, results: Results) -> None:
    """Draw differences from the baseline as a dot a seed, and megabytes as bars."""
    figure.suptitle("Word vectors trained from the start: difference from float32, a dot a seed")
    runs = by_variant(results.trained)
    loss_axes, correlation_axes, bytes_axes = figure.subplots(1, 3, sharey=True)
    _draw_differences(loss_axes, loss_differences(results.trained), "final loss of a pair (less is better)")
    _draw_differences(
        correlation_axes, correlation_differences(results.trained), "correlation with WordSim-353 (more is better)"
    )
    states = [statistics.fmean(run.moment_bytes for run in those) / 1e6 for those in runs.values()]
    tables = [those[0].table_bytes / 1e6 for those in runs.values()]
    bytes_axes.barh(range(len(runs)), tables, color=PALETTE[0], alpha=0.5, label="tables")
    bytes_axes.barh(range(len(runs)), states, left=tables, color=PALETTE[2], label="optimizer's state")
    bytes_axes.set_xlabel("MB")
    bytes_axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    loss_axes.set_yticks(range(len(runs)), list(runs))
    loss_axes.invert_yaxis()
    for axes in (loss_axes, correlation_axes, bytes_axes):
        _tidy(axes)


def _draw_differences(axes: Axes, differences: dict[str, list[float]], label: str) -> None:
    for place, values in enumerate(differences.values()):
        axes.plot(values, [place] * len(values), "o", color=PALETTE[2], alpha=0.6)
        if values:
            axes.plot(statistics.fmean(values), place, "|", color="black", markersize=16)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(label)


def _draw_continued(axes: Axes, results: Results) -> None:
    """Draw how far below the untrained model's each variant's loss is on the same batches, the mean of all seeds."""
    untrained = np.mean(results.untrained_losses, axis=0)
    for (name, those), color in zip(by_variant(results.continued).items(), PALETTE, strict=True):
        gain = untrained - np.mean([run.losses for run in those], axis=0)
        smooth = uniform_filter1d(gain, size=max(1, int(SMOOTHED_SHARE * len(gain))), mode="nearest")
        style = "--" if name.endswith("nearest") else "-"
        axes.plot(np.arange(1, len(gain) + 1), smooth, style, color=color, label=name)
    axes.set_title("Training on with a small learning rate")
    axes.set_xlabel("step")
    axes.set_ylabel("loss below that without training on")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _draw_small_changes(axes: Axes, all_changes: list[SmallChanges]) -> None:
    """Draw how far weights moved, in distances between neighbours, with a band of 10 to 90 % of them."""
    steps = np.arange(1, len(all_changes[0].mean) + 1)
    axes.plot(steps, STEP_IN_SPACINGS * steps, color="black", linestyle=":", label="without rounding")
    for changes, color in zip(all_changes, PALETTE[1:], strict=True):
        style = "-" if changes.stochastic_rounding else "--"
        axes.plot(steps, changes.mean, style, color=color, label=f"{changes.name}: mean, and 10 to 90 %")
        axes.fill_between(steps, changes.low, changes.high, color=color, alpha=0.15, linewidth=0)
    axes.set_title("Weights whose updates are a sixteenth of a spacing")
    axes.set_xlabel("step")
    axes.set_ylabel("spacings moved")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
