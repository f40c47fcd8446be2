"""An inspection for people: in the terminal, and as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keras_gemma_ft.data.examine import printable
from keras_gemma_ft.data.inspect import Histogram, Inspection, Part
from keras_gemma_ft.data.preview import Preview, PreviewToken
from keras_gemma_ft.data.table import TRAIN
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.json_files import write_json, write_text

if TYPE_CHECKING:
    from jinja2 import Template

_LISTED_IN_TERMINAL = 3  # rows of a finding
_LISTED_ON_PAGE = 10
_CLASSES_IN_TERMINAL = 5  # the largest, and the smallest
_TOKENS_IN_TERMINAL = 160  # of a preview
_TOKENS_ON_PAGE = 800
_BAR = 40  # characters of the longest bar
_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "cyan")}


@contextmanager
def reading(console: Console | None = None) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A line that counts rows while they are read; gives what tells a line above it, and what counts."""
    console = console or _console()
    with console.status("reading") as status:
        yield (
            lambda line: console.print(line, markup=False, soft_wrap=True),
            lambda rows: status.update(f"{rows:,} rows"),
        )


def print_report(inspection: Inspection, title: str, console: Console | None = None) -> None:
    """Prints an inspection."""
    console = console or _console()
    short = _shortener(inspection)
    console.print(Text(f"\n{title}", style="bold"))
    console.print(_figures(inspection))
    for finding in inspection.findings:
        mark, style = _MARKS[finding.level]
        console.print(
            Text.assemble((f"{mark} ", f"bold {style}"), (f"{finding.title}: {len(finding.rows):,}", "bold"))
        )
        for where, what in finding.rows[:_LISTED_IN_TERMINAL]:
            console.print(Text(f"    {short(where)}  {short(what)}"), no_wrap=True, overflow="ellipsis")
        if len(finding.rows) > _LISTED_IN_TERMINAL:
            console.print(Text(f"    … and {len(finding.rows) - _LISTED_IN_TERMINAL:,} more", style="dim"))
        console.print(Text(f"  {finding.remedy}", style="dim"))
    if not inspection.findings:
        console.print("Nothing stands out.")
    console.print(_lengths(inspection.histogram, inspection.max_length))
    if inspection.classes:
        console.print(_classes(inspection))
    console.print(_sizes(inspection))
    for caption, preview in inspection.previews[:1]:
        console.print(_preview(short(preview.origin), caption, preview))


def write_report(inspection: Inspection, title: str, path: Path) -> None:
    """Writes the page, and beside it every figure and every row that a finding names, in JSON.

    Raises:
        UserError: It cannot be written, or its name is not that of an HTML page.
    """
    path = check_is_page(path)
    page = _template().render(
        short=_shortener(inspection),
        title=title,
        inspection=inspection,
        levels=[(level, sum(f.level == level for f in inspection.findings)) for level in _MARKS],
        figures=_figure_rows(inspection),
        part_names=list(inspection.parts),
        bars=bars(inspection.histogram, inspection.max_length),
        most_of_class=max((held + train for _, train, held in inspection.classes), default=1),
        previews=[
            (caption, preview, preview.tokens[:_TOKENS_ON_PAGE]) for caption, preview in inspection.previews
        ],
        listed=_LISTED_ON_PAGE,
        details=path.with_suffix(".json").name,
    )
    write_text(path, page)
    write_json(path.with_suffix(".json"), inspection.to_json())


def check_is_page(path: str | Path) -> Path:
    """Refuses a name that may be that of data.

    Raises:
        UserError: It is not that of an HTML page.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise UserError(
            "is not the name of an HTML page", where=str(path), remedy="give one that ends in .html."
        )
    return path


def bars(histogram: Histogram, max_length: int) -> list[tuple[str, int, float, bool]]:
    """For each bin from the first with rows to the last: its range, rows, share of the fullest bin, and
    whether its rows are too long."""
    counts = histogram.counts
    filled = [n for n, count in enumerate(counts) if count]
    if not filled:
        return []
    most = max(counts)
    return [
        (
            f"{histogram.edges[n]:,} to {histogram.edges[n + 1] - 1:,}",
            counts[n],
            counts[n] / most,
            histogram.edges[n] > max_length,
        )
        for n in range(filled[0], filled[-1] + 1)
    ]


def _figure_rows(inspection: Inspection) -> list[tuple[str, list[str]]]:
    """The table of figures: what, and its value for each part."""
    rows: list[tuple[str, Callable[[Part], str]]] = [
        ("rows read", lambda part: f"{part.rows:,}"),
        ("rows that cannot be trained on", lambda part: f"{part.problems:,}"),
        ("examples in the packed rows", lambda part: f"{part.examples:,}"),
        ("tokens, median (least to most)", _span),
        ("tokens, 95 of 100 rows at most", lambda part: f"{part.lengths.p95:,}" if part.lengths else "–"),
        (
            f"longer than {inspection.max_length:,} tokens",
            lambda part: f"{part.too_long:,} ({_share(part.too_long, part.rows - part.problems)})",
        ),
        ("  dropped, truncated, split", lambda part: f"{part.dropped:,}, {part.truncated:,}, {part.split:,}"),
        ("  model turns cut off", lambda part: f"{part.cut_model_turns:,}"),
        ("control tokens spelled", lambda part: f"{part.spelled:,} in {part.spelling_rows:,} rows"),
        ("tokens to train on", lambda part: f"{part.tokens:,}"),
        ("  of them supervised", lambda part: f"{part.trained_tokens:,} ({part.supervised:.1%})"),
        (f"packed rows of {inspection.max_length:,}", lambda part: f"{part.packed_rows:,}"),
        ("  filled", lambda part: f"{part.efficiency:.1%}"),
    ]
    return [(name, [say(part) for part in inspection.parts.values()]) for name, say in rows]


def _span(part: Part) -> str:
    lengths = part.lengths
    return f"{lengths.median:,} ({lengths.least:,} to {lengths.most:,})" if lengths else "–"


def _share(count: int, of: int) -> str:
    return f"{count / max(of, 1):.1%}"


def _figures(inspection: Inspection) -> Table:
    table = _table("", *inspection.parts)
    for name, values in _figure_rows(inspection):
        table.add_row(name, *values)
    return table


def _lengths(histogram: Histogram, max_length: int) -> Table:
    table = _table("tokens", "rows", "")
    for name, count, share, is_too_long in bars(histogram, max_length):
        bar = ("░" if is_too_long else "█") * max(round(share * _BAR), count > 0)
        table.add_row(name, f"{count:,}", Text(f"{bar} too long" if is_too_long and count else bar))
    table.columns[2].justify = "left"
    return table


def _classes(inspection: Inspection) -> Table:
    table = _table(f"{len(inspection.classes):,} classes", *inspection.parts)
    classes = inspection.classes
    if len(classes) > 2 * _CLASSES_IN_TERMINAL + 1:
        middle: Sequence[tuple[Any, ...]] = [("…", "", "")]
        classes = [*classes[:_CLASSES_IN_TERMINAL], *middle, *classes[-_CLASSES_IN_TERMINAL:]]
    for name, *counts in classes:
        shown = [f"{count:,}" if count != "" else "" for count in counts[: len(inspection.parts)]]
        table.add_row(Text(name), *shown)
    return table


def _sizes(inspection: Inspection) -> Table:
    table = _table("recommended rows", "from", "to", f"{inspection.parts[TRAIN].examples:,} are")
    for purpose, low, high, verdict in inspection.sizes:
        table.add_row(purpose, f"{low:,}", f"{high:,}", verdict)
    return table


def _preview(place: str, caption: str, preview: Preview) -> Text:
    text = Text()
    text.append(f"{place}{', which ' * bool(caption)}{caption}; ", "dim")
    text.append("trained", "bold green underline")
    text.append(f": {preview.trained} of {len(preview.tokens)} tokens\n", "dim")
    for token in preview.tokens[:_TOKENS_IN_TERMINAL]:
        style = "bold green underline" if token.trained else "cyan" if token.control else "dim"
        text.append(shown(token), style)
    if len(preview.tokens) > _TOKENS_IN_TERMINAL:
        text.append(f"… {len(preview.tokens) - _TOKENS_IN_TERMINAL} more tokens", "dim")
    return text


def _shortener(inspection: Inspection) -> Callable[[str], str]:
    """Leaves the folder of the data out of a text."""
    return lambda text: text.replace(inspection.folder, "") if inspection.folder else text


def shown(token: PreviewToken) -> str:
    """A token's text; line breaks and control characters can be seen."""
    return printable(token.text).replace("\n", "↵\n")


def _table(*headers: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for n, header in enumerate(headers):
        table.add_column(header, justify="right" if n else "left", no_wrap=True, overflow="ellipsis")
    return table


def _console() -> Console:
    return Console(highlight=False)


def _template() -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files(__package__).joinpath("templates")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.get_template("inspect.html.jinja")
