"""Draws the curves of one or more runs with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arpo_trl.common.files import whole_file
from arpo_trl.common.user_files import short_names
from arpo_trl.logs.curves import Panel, Points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish."""
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "x")
MARKED = 15
"""Lines with at least this number of points have about ten markers, or none if colour and style identify them."""


def look(colour: int, style: int, points: int) -> dict[str, Any]:
    """The colour, line style and marker of a line with that number of points.

    Args:
        colour: The colour's number. Those beyond the palette start again.
        style: The number of the pair of line style and marker.
    """
    marker = style // len(STYLES)
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "linestyle": STYLES[style % len(STYLES)],
        "marker": MARKERS[marker % len(MARKERS)] if marker or points < MARKED else None,
        "markersize": 4,
        "markevery": 1 if points < MARKED else points // 10,
    }


def literal(text: str) -> str:
    """The text for matplotlib, which otherwise takes text between dollar signs as a formula."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Saves the figure in the format that the extension of `path` names. The file is written completely or not at
    all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix[1:])


def picture(panel: Panel, lines: Mapping[Path, Mapping[str, Points]]) -> Figure:
    """Draws the lines of each run, by label.

    One run's lines differ in colour. With several runs, the colour identifies the run, and the style identifies the
    metric. Lines beyond the number of colours and styles also differ in their markers.
    """
    from matplotlib.figure import Figure

    names = short_names(list(lines))
    labels = list(dict.fromkeys(label for of_run in lines.values() for label in of_run))
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    drawn, shown = [], []
    for i, of_run in enumerate(lines.values()):
        for label, points in of_run.items():
            j = labels.index(label)
            colour, style = (i, j + len(labels) * (i // len(COLOURS))) if len(lines) > 1 else (j, j // len(COLOURS))
            drawn += axes.plot(*zip(*points, strict=True), **look(colour, style, len(points)))
            shown.append(f"{names[i]}: {label}" if len(lines) > 1 else label)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Given the lines: by itself, matplotlib leaves out names that begin with _.
    figure.legend(
        drawn, list(map(literal, shown)), loc="outside lower center", ncols=3, fontsize="small", frameon=False
    )
    return figure
