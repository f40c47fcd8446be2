"""The terminal's table: base against tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_gemma_ft.evaluate.statistics import Comparison, Interval

if TYPE_CHECKING:
    from rich.table import Table

# Shares are shown in percent, sacrebleu's scores as it gives them, losses in nats.
_PLAIN = frozenset({"loss", "perplexity", "bleu", "chrf"})


def shown(name: str, value: float | None) -> str:
    """A metric's value as people read it: "83.1%", "1.204", "31.5"."""
    if value is None:
        return "–"
    if name not in _PLAIN:
        return f"{100 * value:.1f}%"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if name in ("bleu", "chrf") else f"{value:.3f}"


def shown_change(name: str, value: float | None) -> str:
    """A difference with its sign; of shares, in percentage points."""
    if value is None:
        return "–"
    text = shown(name, abs(value))
    return ("+" if value >= 0 else "−") + (text[:-1] + " points" if text.endswith("%") else text)


def shown_interval(name: str, interval: Interval | None) -> str:
    """ "83.1% (81.7 to 84.4)"."""
    if interval is None:
        return "–"
    low, high = (shown(name, edge).rstrip("%") for edge in (interval.low, interval.high))
    return f"{shown(name, interval.value)} ({low} to {high})"


def shown_p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def judged(comparison: Comparison, alpha: float = 0.05) -> str:
    """ "better", "worse" or "no clear difference": in words, so that no colour is needed to read it."""
    if comparison.difference is None or comparison.p_value is None:
        return ""
    change = comparison.difference.value
    if comparison.p_value >= alpha or change == 0:
        return "no clear difference"
    return "better" if (change > 0) == (comparison.better == "higher") else "worse"


def comparison_table(comparisons: Sequence[Comparison], *, rows: int, title: str = "") -> Table:
    """A rich table of metrics, 80 columns wide; those of the base are left out where there is none.

    Args:
        comparisons: From `Evaluation.comparisons`.
        rows: How many held-out rows they are over.
        title: Above the table.
    """
    from rich import box
    from rich.table import Table

    with_base = any(comparison.base for comparison in comparisons)
    title = title or f"{rows:,} held-out rows; below each value its 95% interval"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    for column in ("base", "tuned", "change") if with_base else ("tuned",):
        table.add_column(column, justify="right", no_wrap=True)
    if with_base:
        table.add_column("tuned is")
    for comparison in comparisons:
        name = comparison.name
        tuned = _on_two_lines(name, comparison.tuned)
        if not with_base:
            table.add_row(comparison.title, tuned)
            continue
        change = comparison.difference.value if comparison.difference else None
        verdict = judged(comparison)
        if comparison.p_value is not None:
            verdict += f"\np {shown_p(comparison.p_value)}"
        table.add_row(
            comparison.title,
            _on_two_lines(name, comparison.base),
            tuned,
            shown_change(name, change),
            verdict,
        )
    return table


def _on_two_lines(name: str, interval: Interval | None) -> str:
    value, _, edges = shown_interval(name, interval).partition(" (")
    return f"{value}\n{edges.removesuffix(')')}".rstrip()
