"""The picture of a benchmark: how many times faster, and how near to the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .cases import FLOOR, FUSED_STEP, FUSED_WITH_GRADIENT, TORCH_SPARSE
from .report import Record, figure, origin

DOTS_PER_INCH = 130
# Dark enough to read on white, and apart from each other in grey.
SERIES = (
    (TORCH_SPARSE, "torch.optim.SparseAdam", "#1f5fa8"),
    (FUSED_STEP, "Adam(fused=True), step alone", "#e8a33d"),
    (FUSED_WITH_GRADIENT, "Adam(fused=True), with its gradient", "#b3402a"),
)
_FLOOR_COLOR = "#2a7a2a"
_BAR_HEIGHT = 0.26


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw the records to a PNG file."""
    picture = Figure(figsize=(12, 1.8 + 0.7 * len(records)), layout="constrained")
    times, floor = picture.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    times.set_xscale("log")
    for index, (name, label, color) in enumerate(SERIES):
        _draw_bars(times, records, name, label, color, (index - 1) * _BAR_HEIGHT, _BAR_HEIGHT)
    times.set_xlabel("times faster than")
    times.set_yticks(range(len(records)), [record["case"] for record in records])
    times.invert_yaxis()
    _draw_bars(floor, records, FLOOR, "the floor: the bytes that must move, as fast as a copy", _FLOOR_COLOR, 0.0, 0.5)
    floor.set_xlabel("share of the floor's speed")
    for axes in (times, floor):
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.1)
    handles = [handle for axes in (times, floor) for handle in axes.get_legend_handles_labels()[0]]
    target = Line2D([], [], color="black", linewidth=2, label="target")
    picture.legend(handles=[*handles, target], loc="outside lower center", ncols=3, frameon=False)
    picture.suptitle(origin(records[0]), fontsize=8)
    picture.savefig(path, dpi=DOTS_PER_INCH)


def _draw_bars(
    axes: Axes, records: Sequence[Record], name: str, label: str, color: str, offset: float, height: float
) -> None:
    """Draw a bar a case, the 20th to 80th percentile as a whisker and the target, where there is one, as a line."""
    found = [(place + offset, record) for place, record in enumerate(records) if name in record["ratios"]]
    spreads = [record["ratios"][name] for _, record in found]
    medians = [spread["median"] for spread in spreads]
    whiskers = (
        [spread["median"] - spread["low"] for spread in spreads],
        [spread["high"] - spread["median"] for spread in spreads],
    )
    places = [place for place, _ in found]
    axes.barh(places, medians, height=height, color=color, label=label, xerr=whiskers, error_kw={"linewidth": 0.8})
    for (place, record), spread in zip(found, spreads, strict=True):
        text = figure(spread["median"])
        axes.annotate(text, (spread["high"], place), (4, 0), textcoords="offset points", va="center", fontsize=7)
        if name in record["targets"]:
            target = record["targets"][name]
            axes.plot((target, target), (place - height / 2, place + height / 2), color="black", linewidth=2)
