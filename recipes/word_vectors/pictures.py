"""Two pictures: how training went, and where the words ended up."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from sklearn.manifold import TSNE

from .training import History
from .vectors import WordVectors

DOTS_PER_INCH = 150
SMALLEST_SMOOTHED = 50
NEIGHBOURS_DRAWN = 9
LABEL_ROUNDS = 100
PERPLEXITY = 25.0
EXAGGERATION = 2.0  # the usual 12 packs each neighbourhood too tightly for its labels
# Dark enough to read on white.
PALETTE = "#1f5fa8 #c4500a #2a7a2a #b3202c #6f4a9e #7a4a3a #b3408f #4d4d4d #77730a #0b7f8c".split()


def draw_training(history: History, optimizer_name: str, path: Path) -> None:
    """Plot loss and time of a step over training, each with its running median."""
    figure, (loss_axes, time_axes) = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    figure.suptitle(f"Training word vectors with {optimizer_name}", fontsize=14)
    _draw_series(loss_axes, history.losses, "loss of a pair", "tab:blue")
    _draw_series(time_axes, history.step_ms, "optimizer.step(), ms", "tab:orange")
    time_axes.set_xlabel("step")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _draw_series(axes: Axes, values: list[float], label: str, color: str) -> None:
    steps = np.arange(1, len(values) + 1)
    width = max(1, len(values) // SMALLEST_SMOOTHED)
    smooth = median_filter(values, size=width, mode="nearest")
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color=color, linewidth=2, label=f"median of {width}")
    # One stalled step must not flatten all the others.
    axes.set_ylim(0, 1.15 * max(np.quantile(values, 0.99), smooth.max()))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")


def draw_neighbourhoods(vectors: WordVectors, words: list[str], seed: int, path: Path) -> None:
    """Draw each word among its nearest neighbours, in two dimensions, one colour a neighbourhood.

    A word that neighbours several is drawn once, with the first. The projection is t-SNE: distances
    within a neighbourhood mean something, those between far ones do not.
    """
    neighbourhood_of: dict[str, int] = {word: number for number, word in enumerate(words)}
    for number, word in enumerate(words):
        for neighbour in vectors.neighbours(word, NEIGHBOURS_DRAWN):
            neighbourhood_of.setdefault(neighbour, number)
    points = _project([vectors.direction(word) for word in neighbourhood_of], seed)

    figure, axes = plt.subplots(figsize=(13, 9), layout="constrained")
    axes.set_title("Words and their nearest neighbours (t-SNE of the trained vectors)", fontsize=15)
    axes.set_axis_off()
    axes.margins(0.08)
    colors = [PALETTE[number % len(PALETTE)] for number in neighbourhood_of.values()]
    axes.scatter(*points.T, c=colors, s=14)
    labels = [
        axes.text(*point, word, color=color, **_label_style(word in words))
        for point, word, color in zip(points, neighbourhood_of, colors, strict=True)
    ]
    leader = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.6}
    adjust_text(labels, ax=axes, iter_lim=LABEL_ROUNDS, expand=(1.1, 1.3), arrowprops=leader)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _label_style(is_center: bool) -> dict[str, object]:
    return {"fontsize": 15, "fontweight": "bold"} if is_center else {"fontsize": 11}


def _project(directions: list[NDArray[np.float32]], seed: int) -> NDArray[np.float32]:
    perplexity = min(PERPLEXITY, (len(directions) - 1) / 3)
    projection = TSNE(
        perplexity=perplexity,
        early_exaggeration=EXAGGERATION,
        metric="cosine",
        init="random",
        random_state=seed,
    )
    return projection.fit_transform(np.stack(directions))
