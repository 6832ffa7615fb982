"""The curves of a page, as inline SVG in the colours of its scheme: matplotlib draws them, so a page needs no library of its own.

matplotlib is imported only when something is drawn: that takes a while, writes a list of fonts into a cache folder, and warns
where it cannot.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convrewrite.process import quiet
from convrewrite.reporting.figures import percent
from convrewrite.reporting.report import RecoveredSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SIZE = (6.2, 3.3)
"""Inches of a chart, at 72 pixels an inch: near the width it is shown at, both on a telephone and beside another chart."""

MARGIN = 1.1
"""How far a curve's axis goes on beyond it, at least: ticks of one that is nearly flat would have the same label otherwise."""

INKS = {"#010101": "--ink", "#020202": "--soft", "#030303": "--line", "#040404": "--accent", "#050505": "--mark"}
"""Colours that are drawn with, and the colour of the page's scheme that replaces each."""

INK, SOFT, LINE, ACCENT, MARK = INKS

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "convrewrite", "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif",
    "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "grid.color": LINE, "grid.linewidth": 0.7,
    "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 10,
}  # fmt: skip
"""The same report gives the same bytes: ids come from a fixed salt. Letters stay letters, in the page's font."""


@dataclass(frozen=True, slots=True)
class ErrorPoint:
    """One rewritten site: its place in the network, from 1, and its relative output error: alone, by which it was chosen, and as
    measured after all sites before it. None: not measured."""

    place: int
    alone: float | None
    measured: float | None


def depth_chart(points: Sequence[ErrorPoint]) -> str:
    """The errors of the sites in the order of the network, as an ``<svg>`` element; empty where none was measured."""
    measured = [(point.place, point.measured) for point in points if point.measured is not None]
    alone = [(point.place, point.alone) for point in points if point.alone is not None]
    if not measured:
        return ""
    with drawing() as (figure, axes):
        places, errors = zip(*measured, strict=True)
        axes.bar(places, errors, width=0.7, color=ACCENT, label="in the rewritten network")
        if alone:
            axes.plot(*zip(*alone, strict=True), "o", color=MARK, markersize=4.5, label="this site alone")
        axes.set_xlabel("place in the network")
        axes.set_ylabel("relative output error")
        from matplotlib.ticker import FuncFormatter

        _whole_numbers(axes.xaxis)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        axes.grid(axis="x", visible=False)
        draw_legend(axes)
        return svg_of(figure)


def agreement_chart(points: Sequence[ErrorPoint]) -> str:
    """Errors that the choice expected against those that were measured, as an ``<svg>`` element; empty where there are none."""
    both = [(p.alone, p.measured) for p in points if p.alone and p.measured and math.isfinite(p.alone + p.measured)]
    if not both:
        return ""
    ends = [min(map(min, both)) / 1.5, max(map(max, both)) * 1.5]
    with drawing() as (figure, axes):
        axes.plot(ends, ends, color=SOFT, linewidth=1, linestyle="--", label="as expected")
        axes.plot(*zip(*both, strict=True), "o", color=ACCENT, markersize=6, label="a site")
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis, percent)
        axes.set_xlabel("expected: this site alone")
        axes.set_ylabel("measured: in the rewritten network")
        draw_legend(axes)
        return svg_of(figure)


def recovery_chart(recovered: RecoveredSummary) -> str:
    """The effect on held-out inputs over the steps of a recovery, and that of what came in, as an ``<svg>`` element."""
    points = [(step, effect) for step, effect in recovered.curve if 0 < effect < math.inf]
    came = [recovered.before] if 0 < recovered.before < math.inf else []
    with drawing() as (figure, axes):
        axes.plot([step for step, _ in points], [effect for _, effect in points], ".-", color=ACCENT, label="held out")
        if came:
            axes.axhline(recovered.before, color=SOFT, linestyle="--", label="what came in")
        if not recovered.unchanged:
            axes.plot([recovered.kept_step], [recovered.after], "o", color=MARK, label="kept")
        if points:
            shown = [effect for _, effect in points] + came
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis, lambda effect: f"{effect:.3g}")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, min(shown) / MARGIN), max(high, max(shown) * MARGIN))
        _whole_numbers(axes.xaxis)
        axes.set_xlabel("steps")
        axes.set_ylabel("effect on held-out inputs")
        draw_legend(axes)
        return svg_of(figure)


@contextmanager
def drawing() -> Iterator[tuple["Figure", "Axes"]]:
    """An empty, transparent drawing in the style of all charts. What a user's ``matplotlibrc`` says does not count, nor one that
    lies in the working folder, whoever's that is: by it matplotlib would call LaTeX."""
    with quiet(("matplotlib",)):  # it warns of a home folder that cannot be written
        import matplotlib
        from matplotlib.figure import Figure
    usual = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context(usual | STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        yield figure, axes


def _whole_numbers(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plain_numbers(axis: "Axis", text: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis: powers of ten, and twice and five times these, as plain numbers. matplotlib's own are
    formulas, slow to lay out."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def draw_legend(axes: "Axes") -> None:
    """Above the drawing, where it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def svg_of(figure: "Figure") -> str:
    """The drawing as an ``<svg>`` element, in colours that the page's scheme gives; no date in it."""
    buffer = io.StringIO()
    with quiet():  # it warns of missing glyphs
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for drawn, ink in INKS.items():
        text = text.replace(drawn, f"var({ink})")
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
