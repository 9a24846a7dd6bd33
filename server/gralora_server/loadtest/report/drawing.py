"""How a plot is drawn: twice, as SVG whose colours are the page's, light or dark, and as PNG on white."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gralora_runtime.errors import ConfigError
from gralora_server.loadtest.report.findings import seconds

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
except ImportError as cause:
    raise ConfigError("plots need matplotlib: pip install 'gralora-server[loadtest]'") from cause

# Colours that every reader can tell apart (Okabe and Ito 2008), a marker and a line for who sees none.
SERIES = ("#0072b2", "#c75000", "#007a5a", "#a8508a", "#7a6a00")
MARKERS, LINES, HATCHES = "osD^v", ("-", "--", "-.", ":", "-"), ("", "//", "..", "xx", "--")
INK, GRID = "#1f2328", "#d0d7de"
SIZE = (5.4, 3.3)


@dataclass(frozen=True, slots=True)
class Plot:
    """`text` says what the plot shows, with its main figures, for who cannot see it."""

    name: str
    title: str
    text: str
    svg: str
    png: bytes


def drawn(name: str, title: str, text: str, draw: Callable[[Axes], None], height: float = SIZE[1]) -> Plot:
    style: Any = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "font.size": 12.5,  # points of 389 in width: some 11 pixels on a phone
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # ids within the drawing, of all plots on one page, must differ
        "font.family": "sans-serif",
    }
    with rc_context(style):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        draw(figure.subplots())
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name, title, text, _themed(svg.getvalue()), png.getvalue())


def delay_scale(axes: Axes) -> None:
    """Seconds on a logarithmic scale, in words, with more marks where one power of ten holds everything."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, high * 1.3)
    steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda at_s, _: f"{at_s:g} s" if at_s >= 1 else seconds(at_s)))
    axes.yaxis.set_minor_locator(NullLocator())


def _themed(svg: str) -> str:
    """The drawing alone, with the page's colours in place of the fixed ones."""
    drawing = svg[svg.index("<svg") :]
    for number, colour in enumerate(SERIES):
        drawing = drawing.replace(colour, f"var(--series-{number})")
    return drawing.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
