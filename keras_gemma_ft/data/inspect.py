"""Shows a dataset before any accelerator is rented: what is in it, what stands out, and what the loss sees.

    keras-gemma-ft data inspect --config=configs/data/banking77.py --out=banking77.html

The figures are those of the run that the config would start: the same reader, held-out split, template,
truncation and packing. No weight is read. Rows stream through worker processes; what is kept of each is a few
hundred bytes, and a sketch of its question of at most two kilobytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma_ft.config import DATASET_SIZES
from keras_gemma_ft.data.examine import Examiner, printable
from keras_gemma_ft.data.findings import Finding, all_findings
from keras_gemma_ft.data.preview import Preview
from keras_gemma_ft.data.rows import Row
from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.table import HELD_OUT, TRAIN, Table, class_counts
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.workers import ChunkedWork
from keras_gemma_ft.errors import UserError

_PREVIEWS = {"first": "", "spelled": "spells control tokens", "shortened": "was too long"}


@dataclass(frozen=True)
class Lengths:
    """Tokens of conversations, before any is shortened."""

    least: int
    median: int
    mean: float
    p95: int
    most: int


@dataclass(frozen=True)
class Part:
    """Figures of the training or the held-out part; see `prepare` for what is counted how.

    Attributes:
        rows: Read.
        problems: Rows that cannot be trained on.
        examples: In the packed rows; one for each sound row, unless it is dropped or split.
        too_long: Rows longer than `max_length`; of them `dropped`, `truncated` and `split`.
        cut_model_turns: Model turns that lost their end.
        spelled: Control tokens spelled in the data, in `spelling_rows`.
        packed_rows, tokens, trained_tokens: What the loss sees.
        efficiency: Share of the packed rows that is no padding.
        supervised: Share of the tokens that is trained.
        lengths: None where no row is sound.
    """

    rows: int
    problems: int
    examples: int
    too_long: int
    dropped: int
    truncated: int
    split: int
    cut_model_turns: int
    spelled: int
    spelling_rows: int
    packed_rows: int
    tokens: int
    trained_tokens: int
    efficiency: float
    supervised: float
    lengths: Lengths | None


@dataclass(frozen=True)
class Histogram:
    """Rows by their number of tokens: `counts[i]` from `edges[i]` up to, not including, `edges[i + 1]`."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Inspection:
    """What there is to see of a dataset.

    Attributes:
        parts: By name: `train`, and `held-out` if there is one.
        findings: Errors first.
        histogram: Of all sound rows.
        classes: Name, training rows and held-out rows, the largest first; empty where there are no classes.
        classes_are_answers: Whether answers were taken for classes, as the rows have no labels.
        languages: Name and rows.
        sizes: Purpose, recommended rows from and to, and how the training part compares.
        previews: What is remarkable about each, and the tokens.
        max_length: Tokens of a row.
        similarity: From which on questions count as alike.
        folder: What the places of all rows begin with, up to the last slash; reports leave it out.
    """

    parts: dict[str, Part]
    findings: list[Finding]
    histogram: Histogram
    classes: list[tuple[str, int, int]]
    classes_are_answers: bool
    languages: list[tuple[str, int]]
    sizes: list[tuple[str, int, int, str]]
    previews: list[tuple[str, Preview]]
    max_length: int
    similarity: float
    folder: str

    def to_json(self) -> dict[str, Any]:
        """All but the previews, with every row that a finding names."""
        return {key: value for key, value in asdict(self).items() if key != "previews"}


def inspect(
    parts: Mapping[str, Iterable[Row]],
    tokenizer: Tokenizer,
    recipe: Recipe,
    similarity: float = 0.8,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Inspection:
    """Examines a training part, and a held-out part if there is one.

    Args:
        parts: Rows of `train`, and of `held-out`; each is read once.
        tokenizer, recipe: As for `prepare`.
        similarity: Jaccard similarity of the questions from which on two rows are near duplicates.
        workers: See `ChunkedWork`.
        progress: Called after every chunk with the number of rows so far.

    Raises:
        UserError: A row is wrong and its reader does not skip such rows.
    """
    table = Table(list(parts), similarity, recipe.max_length)
    counts: list[Counter[str]] = []
    previews: dict[str, list[Preview]] = {}
    done = 0
    for number, rows in enumerate(parts.values()):
        counts.append(Counter())
        work = ChunkedWork(rows, recipe.max_length, workers)
        for examined in work.results(partial(Examiner, tokenizer, recipe)):
            table.add(number, examined)
            counts[-1] += examined.counts
            for name, found in examined.previews.items():
                previews[name] = previews.get(name) or found
            done += examined.counts["conversations"]
            if progress:
                progress(done)
    trained, held_out = class_counts(table)
    figures = {
        name: _part(counts[n], table.tokens[table.part == n], recipe.max_length)
        for n, name in enumerate(parts)
    }
    return Inspection(
        figures,
        all_findings(table),
        _histogram(table.tokens, recipe.max_length),
        sorted(
            ((name, trained[name], held_out[name]) for name in trained | held_out),
            key=lambda each: (-each[1], -each[2], each[0]),
        ),
        bool(table.classes) and not any(label is not None for label in table.labels),
        Counter(name or "not clear" for name in table.languages).most_common(),
        _sizes(figures[TRAIN].examples),
        [(_PREVIEWS[name], preview) for name in _PREVIEWS for preview in previews.get(name, [])],
        recipe.max_length,
        similarity,
        _folder([*table.origins, *(printable(problem.where) for problem in table.problems)]),
    )


def main(config: Mapping[str, Any], out: Path | None = None) -> Inspection:
    """Inspects what a config would train on; prints the report, and writes it as a page.

    Args:
        config: As `keras_gemma_ft.config.validate` accepts it.
        out: The HTML page; beside it goes a file of the same name in JSON with every figure, and every row
            that a finding names. None: neither is written.

    Raises:
        UserError: A file cannot be read, or the page cannot be written.
    """
    from keras_gemma_ft.data.from_config import tokenizer_and_recipe
    from keras_gemma_ft.data.inspect_report import check_is_page, print_report, reading, write_report
    from keras_gemma_ft.data.readers import conversations, each_once, readings

    title = printable(config["data"]["train"])
    if out is not None:
        check_is_page(out)
    tokenizer, recipe = tokenizer_and_recipe(config)
    config = each_once(config)
    with reading() as (tell, progress):
        look = partial(
            inspect,
            tokenizer=tokenizer,
            recipe=recipe,
            similarity=config["clean"]["similarity"],
            progress=progress,
        )
        try:
            inspection = look(dict(zip((TRAIN, HELD_OUT), conversations(config, tell), strict=True)))
        except UserError as error:
            if error.where != "data.eval_fraction":
                raise
            tell(f"all rows are shown as training rows: {error.what}")
            inspection = look({TRAIN: readings(config)[0]})
    print_report(inspection, title)
    if out is not None:
        write_report(inspection, title, out)
    return inspection


def _folder(places: list[str]) -> str:
    first, last = min(places, default=""), max(places, default="")
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]


def _part(counts: Counter[str], tokens: np.ndarray, max_length: int) -> Part:
    lengths = None
    if len(tokens):
        least, median, p95, most = np.quantile(tokens, [0, 0.5, 0.95, 1], method="nearest").tolist()
        lengths = Lengths(least, median, round(float(tokens.mean()), 1), p95, most)
    return Part(
        rows=counts["conversations"],
        problems=counts["skipped"],
        examples=counts["examples"],
        too_long=int((tokens > max_length).sum()),
        dropped=counts["dropped"],
        truncated=counts["truncated"],
        split=counts["split"],
        cut_model_turns=counts["cut_model_turns"],
        spelled=counts["neutralized_tokens"],
        spelling_rows=counts["neutralized_conversations"],
        packed_rows=counts["rows"],
        tokens=counts["tokens"],
        trained_tokens=counts["trained_tokens"],
        efficiency=counts["tokens"] / max(counts["rows"] * max_length, 1),
        supervised=counts["trained_tokens"] / max(counts["tokens"], 1),
        lengths=lengths,
    )


def _histogram(tokens: np.ndarray, max_length: int) -> Histogram:
    """Two bins for each doubling; `max_length` is an edge, one above, so that what fits stands below it."""
    largest = max(int(tokens.max(initial=1)), max_length) + 1
    edges = {0, max_length + 1}
    edge = 16.0
    while edge < largest:
        # An edge too near to the one at max_length would make a bin that holds next to nothing.
        if abs(np.log2(edge / (max_length + 1))) > 0.2:
            edges.add(round(edge))
        edge *= 2**0.5
    edges.add(max(round(edge), largest))
    borders = sorted(edges)
    return Histogram(borders, np.histogram(tokens, borders)[0].tolist())


def _sizes(rows: int) -> list[tuple[str, int, int, str]]:
    """How many rows compare with what the fine-tuning guide recommends, by purpose."""
    return [
        (purpose, low, high, "fewer" if rows < low else "more" if rows > high else "within")
        for purpose, (low, high) in DATASET_SIZES.items()
    ]
