"""One picture, a row a task: losses, their distance from dense Adam's, and the judgement by learning rate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .methods import DENSE, METHODS
from .results import Results, relative_differences

DOTS_PER_INCH = 110
# Dark enough to read on white, in the order of METHODS.
PALETTE = "#4d4d4d #2a7a2a #1f5fa8 #b3202c #e08a1e".split()
COLORS = {method.name: color for method, color in zip(METHODS, PALETTE, strict=True)}
AIM = 0.005  # how far from dense Adam's a loss may be


def draw(all_results: Sequence[Results], path: Path) -> None:
    """Draw all tasks to a PNG file."""
    figure = Figure(figsize=(14, 3.6 * len(all_results) + 0.5), layout="constrained")
    rows = figure.subplots(len(all_results), 3, squeeze=False)
    for results, (loss_axes, difference_axes, judgement_axes) in zip(all_results, rows, strict=True):
        colors = {name: COLORS[name] for name in results.methods()}
        rate = results.best_rate(DENSE.name)
        _draw_losses(loss_axes, results, colors, rate)
        _draw_differences(difference_axes, results, colors)
        _draw_judgements(judgement_axes, results, colors)
        loss_axes.set_title(f"{results.name}: training loss, learning rate {rate:g}")
    rows[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_losses(axes: Axes, results: Results, colors: dict[str, str], rate: float) -> None:
    """Draw the loss by epoch, seed 0; dense Adam's is a wide line for others to lie on."""
    for method, color in colors.items():
        run = results.find(method, rate, seed=0)
        if run is not None:
            width, alpha = (6, 0.35) if method == DENSE.name else (1.5, 1)
            epochs = np.arange(1, len(run.losses) + 1)
            axes.plot(epochs, run.losses, color=color, linewidth=width, alpha=alpha, marker=".", label=method)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    _tidy(axes)


def _draw_differences(axes: Axes, results: Results, colors: dict[str, str]) -> None:
    """Draw how far the loss is from dense Adam's with the same rate and seed, every such run a line."""
    for run in results.runs:
        dense = results.find(DENSE.name, run.lr, run.seed)
        if run.method != DENSE.name and dense is not None:
            distances = np.abs(relative_differences(run, dense))
            axes.plot(np.arange(1, len(distances) + 1), distances, color=colors[run.method], alpha=0.6, linewidth=1)
    axes.axhline(AIM, color="black", linewidth=0.8, linestyle=":", label=f"{AIM:.1%}")
    axes.legend(frameon=False, fontsize=8)
    axes.set_yscale("log")
    axes.set_title("share by which losses differ from dense Adam's, all rates")
    axes.set_xlabel("epoch")
    _tidy(axes)


def _draw_judgements(axes: Axes, results: Results, colors: dict[str, str]) -> None:
    metric = results.metrics[0]
    for method, color in colors.items():
        runs = sorted((run for run in results.runs if run.method == method), key=lambda run: run.lr)
        first = [run for run in runs if run.seed == 0]
        width, alpha = (6, 0.35) if method == DENSE.name else (1.5, 1)
        axes.plot(
            [run.lr for run in first], [run.valid[metric] for run in first], color=color, linewidth=width, alpha=alpha
        )
        axes.plot([run.lr for run in runs], [run.valid[metric] for run in runs], ".", color=color, alpha=0.6)
    axes.set_xscale("log")
    axes.set_title(f"validation {metric} (a dot a seed)")
    axes.set_xlabel("learning rate")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
