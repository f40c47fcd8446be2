"""`report.html`, `report.md` and `metrics.json` from one run directory: the same numbers three times."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_gemma_ft.advice import Settings, as_lines
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate import plots
from keras_gemma_ft.evaluate.next_steps import after_training
from keras_gemma_ft.evaluate.run_record import PARTS, RunRecord, read_run
from keras_gemma_ft.evaluate.statistics import Comparison, Interval
from keras_gemma_ft.evaluate.table import judged, shown, shown_change, shown_interval, shown_p
from keras_gemma_ft.evaluate.without_rows import without_rows
from keras_gemma_ft.json_files import finite, write_json, write_text

if TYPE_CHECKING:
    from jinja2 import Template
    from ml_collections import ConfigDict

_WORST_SHOWN = 12
_LONGEST_TEXT = 1200
_ALIKE = 0.4


def main(config: ConfigDict, workdir: str | Path, *, quote_rows: bool = True, out: str | None = None) -> Path:
    """The verb `report`: writes the report of a run again, or one to be shared.

    Raises:
        UserError: As `write_report` does, or `out` is no name for a page.
    """
    if out is not None and Path(out).suffix != ".html":
        raise UserError("is no name for a page", where=f"--out={out}", remedy="end it in .html.")
    place = Path(workdir).expanduser()
    run = read_run(place) if quote_rows else without_rows(read_run(place))
    path = None if out is None else Path(out).expanduser()
    page = write_report(place, advice=next_steps(config, run), quote_rows=quote_rows, out=path)
    print(f"{page}\n{page.with_suffix('.md')}")
    return page


def next_steps(config: ConfigDict, run: RunRecord) -> list[str]:
    """What to try next, one line each, from the last verdict and the evaluation of a run."""
    counts = (run.manifest.get("data") or {}).get("counts") or {}
    settings = Settings.from_config(config, rows=(counts.get("train") or {}).get("examples"))
    verdict = run.verdicts[-1] if run.verdicts else None
    return as_lines(after_training(settings, verdict=verdict, evaluation=run.evaluation))


def write_report(
    directory: str | Path,
    *,
    advice: Sequence[str] = (),
    title: str | None = None,
    quote_rows: bool = True,
    out: Path | None = None,
) -> Path:
    """Writes the report of a run.

    Args:
        directory: A run directory; whatever of its files exists is reported, the rest is named as missing.
        advice: What to try next, one line each.
        title: Default: the directory's name.
        quote_rows: Whether it may hold texts of rows, labels and directories; see `without_rows`.
        out: The page, beside which the same goes as Markdown; None: `report.html` in the directory, and its
            numbers in `metrics.json` too.

    Returns:
        The path of the page.

    Raises:
        UserError: The directory holds no run, a file of it cannot be read, or the report cannot be written.
    """
    run = read_run(directory)
    if not quote_rows:
        run = without_rows(run)
    numbers = summarize(run)
    shared = {
        "title": title or run.directory.resolve().name,
        "numbers": numbers,
        "comparisons": comparison_rows(numbers.get("metrics", [])),
        "forgetting": numbers.get("forgetting"),
        "forgetting_rows": comparison_rows((numbers.get("forgetting") or {}).get("metrics", [])),
        "quote_rows": quote_rows,
        "worst_places": (run.evaluation.get("worst_places") or [])[:_WORST_SHOWN],
        "worst": [worst_example(row) for row in (run.evaluation.get("worst") or [])[:_WORST_SHOWN]],
        "details": (run.evaluation.get("details") or {}).get("tuned") or {},
        "facts": {name: _flat(run.manifest.get(name) or {}) for name in ("data", "environment", "cost")},
        "config": _flat(run.config),
        "advice": list(advice),
        "missing": [(name, PARTS[name]) for name in run.missing],
        "audit": run.audit,
        "samples": [_shortened_sample(sample) for sample in run.samples],
    }
    html = template("report.html.jinja").render(figures=figures(run), **shared)
    markdown = template("report.md.jinja", escape=False).render(**shared)
    path = out or run.directory / "report.html"
    write_text(path, html)
    write_text(path.with_suffix(".md"), re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n")
    if out is None:
        write_json(run.directory / "metrics.json", {**numbers, "advice": list(advice)})
    return path


def _told(run: RunRecord) -> list[dict[str, Any]]:
    """The verdicts that differ from the one before, and the last one if it has other reasons by then."""
    first, last = run.turning_points, run.verdicts[-1]
    return first if first[-1]["reason"] == last["reason"] else [*first, last]


def summarize(run: RunRecord) -> dict[str, Any]:
    """The numbers of a run, as `metrics.json` holds them; only what was measured is there."""
    numbers: dict[str, Any] = {}
    steps, train = run.curve("loss")
    if len(steps):
        recent = train[-max(1, len(train) // 20) :]
        numbers["steps"] = int(steps[-1])
        numbers["train_loss"] = {"first": float(train[0]), "last_median": float(np.median(recent))}
    held_steps, held_out = run.curve("eval_loss")
    if np.isfinite(held_out).any():
        best = int(np.nanargmin(held_out))
        numbers["held_out_loss"] = {
            "first": float(held_out[0]),
            "best": float(held_out[best]),
            "best_step": int(held_steps[best]),
            "last": float(held_out[-1]),
        }
    if run.best is not None:
        numbers["best"] = run.best._asdict()
    _, throughput = run.curve("tokens_per_second")
    if len(throughput):
        numbers["tokens_per_second"] = float(np.median(throughput))
    if run.verdicts:
        numbers["verdict"] = run.verdicts[-1]
        numbers["verdict_changes"] = [
            {"step": verdict["step"], "verdict": verdict["verdict"], "reason": verdict["reason"]}
            for verdict in _told(run)
        ]
    for name in ("task", "rows", "confidence", "metrics", "forgetting", "seconds"):
        if name in run.evaluation:
            numbers[name] = run.evaluation[name]
    errors = {name: error for name, (_, error) in plots.calibrations(run.predictions).items()}
    if errors:
        numbers["calibration_error"] = errors
    summary: dict[str, Any] = finite(numbers)
    return summary


def figures(run: RunRecord) -> list[dict[str, Any]]:
    """Title, SVG and a sentence in words for each figure that the run has data for."""
    from markupsafe import Markup

    tuned = (run.evaluation.get("details") or {}).get("tuned") or {}
    drawn = (
        (
            "Loss",
            plots.loss_curves(run),
            "Training loss (solid), held-out loss (dashed, dots), best checkpoint (star); verdicts at dotted "
            "lines.",
        ),
        ("Learning rate", plots.series(run, "learning_rate", "learning rate"), "Over the steps of the run."),
        (
            "Throughput",
            plots.series(run, "tokens_per_second", "tokens per second"),
            "Of each step, without the time that compilation and held-out measurements take.",
        ),
        (
            "Confusion matrix",
            plots.confusion_matrix(tuned),
            "Tuned model: each row is an expected label, darker means a larger share of its answers.",
        ),
        (
            "Length against error",
            plots.length_against_error(run.predictions),
            "Mean score of rows with prompts of similar length; bars are standard errors.",
        ),
        (
            "Calibration",
            plots.calibration(run.predictions),
            "Confidence is the probability of the whole answer; on the line, the model is right that often.",
        ),
    )
    return [{"title": title, "svg": Markup(svg), "caption": text} for title, svg, text in drawn if svg]


def comparison_rows(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table base against tuned, ready to print."""
    rows = []
    for metric in metrics:
        comparison = Comparison(
            metric["name"],
            metric["title"],
            metric["better"],
            _interval(metric["base"]),
            _interval(metric["tuned"]) or Interval(math.nan, math.nan, math.nan),
            _interval(metric["difference"]),
            metric["p_value"],
            metric["test"],
        )
        name, change = comparison.name, comparison.difference
        rows.append(
            {
                "title": comparison.title,
                "base": shown_interval(name, comparison.base),
                "tuned": shown_interval(name, comparison.tuned),
                "tuned_value": shown(name, comparison.tuned.value),
                "base_value": shown(name, comparison.base.value) if comparison.base else "",
                "change": shown_change(name, change.value if change else None),
                "p": shown_p(comparison.p_value),
                "test": comparison.test or "",
                "judged": judged(comparison),
            }
        )
    return rows


def worst_example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A failed row with the difference between the expected and the given answer, word by word."""
    tuned = row["tuned"]
    return {
        "origin": row["origin"],
        "prompt": [{"role": m["role"], "content": _shortened(m["content"])} for m in row["prompt"]],
        "reference": _shortened(row["reference"]),
        "answer": _shortened(tuned["answer"]),
        "base_answer": _shortened(row["base"]["answer"]) if "base" in row else None,
        "note": tuned["note"],
        "score": tuned["score"],
        "difference": difference(_shortened(row["reference"]), _shortened(tuned["answer"])),
    }


def difference(expected: str, given: str) -> list[tuple[str, str]]:
    """`("same" | "missing" | "extra", text)` pieces that lead from the expected answer to the given one."""
    old, new = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (expected, given))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < _ALIKE:  # a few words that happen to agree only make it hard to read
        return [piece for piece in (("missing", expected), ("extra", given)) if piece[1]]
    pieces = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(old[a:b])))
            continue
        if b > a:
            pieces.append(("missing", "".join(old[a:b])))
        if d > c:
            pieces.append(("extra", "".join(new[c:d])))
    return pieces


def template(name: str, *, escape: bool = True) -> Template:
    """A template of this package; HTML ones escape what they are given."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files(__package__).joinpath("templates")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name)


def _interval(record: Mapping[str, Any] | None) -> Interval | None:
    if record is None or record["value"] is None:
        return None
    low, high = (math.nan if record[edge] is None else record[edge] for edge in ("low", "high"))
    return Interval(record["value"], low, high)


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text, in their own order."""
    if isinstance(value, Mapping):
        return [
            pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(map(str, value)))]
    return [(name, f"{value:,}" if type(value) is int and value >= 10_000 else str(value))]


def _shortened_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: _shortened(sample[name]) for name in ("prompt", "expected")}
    return {**sample, **texts, "answers": [_shortened(answer) for answer in sample["answers"]]}


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT].rstrip() + " …"
