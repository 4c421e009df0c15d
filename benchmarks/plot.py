"""The report as one figure: a panel a question, a bar for each peer, beside dmap."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.peers import PEERS

INK = "#808890"
"""Readable on white and on nearly black."""
BEHIND, AHEAD, LIMIT = "#4c8fd0", "#e08a3c", "#808890"
N_COLUMNS = 3


def bars(asked: table.Asked) -> list[tuple[str, float, str]]:
    """Return each peer's name, how many times better than dmap its best way is, and its colour.

    It goes by the first unit. The limit is the last.
    """
    found = []
    for unit in table.units(asked)[:1]:
        ways = table.answered(asked, unit)
        for peer in [*PEERS, "limit"]:
            best = table.best_of(asked, [way for way in ways if way["peer"] == peer], unit)
            ratio = best and table.beside_dmap(asked, best, unit)
            if peer != "dmap" and ratio:
                better = 1 / ratio
                colour = LIMIT if peer == "limit" else AHEAD if better > 1 else BEHIND
                name = "limit" if peer == "limit" else PEERS[peer].title
                found.append((name, better, colour))
    return found


def draw(report: dict[str, Any], file: Path) -> None:
    """Write the figure, as SVG that is the same for the same report.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = [asked for asked in report["questions"].values() if bars(asked)]
    n_rows = max(1, -(-len(panels) // N_COLUMNS))
    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # letters, not outlines: small, and in the reader's font
        "svg.hashsalt": "dmap",
        "font.size": 8,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 0.4 + 2.3 * n_rows), layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(
            "How many times better than dmap, each at its best (log scale). "
            "Orange: ahead of dmap; blue: behind; grey: the limit.",
            fontsize=9,
        )
        for number, asked in enumerate(panels):
            axes = figure.add_subplot(n_rows, N_COLUMNS, number + 1)
            panel(axes, asked)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    # Each text names a dozen fonts; the reader's own will do, and half of the file is gone.
    file.write_text(re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "sans-serif", drawn.getvalue()))


def panel(axes: Any, asked: table.Asked) -> None:
    """Draw one question."""
    from matplotlib.ticker import NullLocator

    found = bars(asked)[::-1]
    unit = table.units(asked)[0]
    names, values, colours = zip(*found, strict=True)
    # On a log scale a bar begins where it is told to: at dmap.
    axes.barh(names, [value - 1 for value in values], left=1, color=colours, height=0.7)
    axes.set_xscale("log")
    least, largest = min(0.5, *values), max(2.0, *values)
    room = (largest / least) ** 0.3  # for the numbers, on either side
    axes.set_xlim(least / room, largest * room)
    axes.axvline(1, color=INK, linewidth=1)
    for y, value in enumerate(values):
        ahead = value >= 1
        axes.annotate(
            f"{table.shown(value)}",
            (value, y),
            (2 if ahead else -2, 0),
            textcoords="offset points",
            ha="left" if ahead else "right",
            va="center",
            fontsize=7,
        )
    title = f"{asked['title']} ({unit})"
    axes.set_title("\n".join(textwrap.wrap(title, 40)), fontsize=7.5)
    axes.tick_params(length=0, labelsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
