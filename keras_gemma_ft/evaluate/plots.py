"""The report's figures: inline SVG by matplotlib, told apart by shape and label and never by colour alone."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_gemma_ft.evaluate.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches. Narrow, so that letters stay readable when a phone scales the figure down.
_SIZE = (5.2, 3.5)
# Dark and light: they differ in print and to every eye.
_DARK, _LIGHT, _FAINT = "#123a6b", "#d9781f", "#9aa7b5"
_STYLE: dict[str, Any] = {
    "base": {"marker": "s", "linestyle": ":", "color": _LIGHT},
    "tuned": {"marker": "o", "linestyle": "-", "color": _DARK},
}
_MOST_LABELLED = 20
_ID = re.compile(r'(?<=\s)id="|href="#|url\(#')


@contextlib.contextmanager
def svg_figure(name: str, size: tuple[float, float] = _SIZE) -> Iterator[tuple[Axes, list[str]]]:
    """Yields axes, and a list that holds the SVG afterwards."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # the same run gives the same bytes
        "font.family": ["sans-serif"],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e7ec",
        "legend.frameon": False,
        "text.parse_math": False,  # a label may hold a dollar sign
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        result: list[str] = []
        yield figure.add_subplot(), result
        with io.StringIO() as svg:
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            text = svg.getvalue()
        # Figures of one page must not share ids.
        result.append(_ID.sub(rf"\g<0>{name}-", text[text.index("<svg") :]))


def loss_curves(run: RunRecord) -> str | None:
    """Training and held-out loss, the best held-out step, and each verdict where it was given."""
    train_steps, train = run.curve("loss")
    held_steps, held_out = run.curve("eval_loss")
    if not len(train_steps) and not len(held_steps):
        return None
    with svg_figure("loss") as (axes, svg):
        if len(train_steps):
            axes.plot(train_steps, train, color=_FAINT, linewidth=0.6)
            axes.plot(
                train_steps, _smoothed(train), color=_LIGHT, linewidth=1.6, label="training (running median)"
            )
        if len(held_steps):
            axes.plot(
                held_steps, held_out, color=_DARK, linestyle="--", marker="o", markersize=4, label="held-out"
            )
        if run.best is not None:
            by = "" if run.best.metric == "loss" else f" by {run.best.metric}"
            axes.plot(
                run.best.step,
                run.best.loss,
                "*",
                color=_DARK,
                markersize=14,
                label=f"best{by}: step {run.best.step}",
            )
        _limit_losses(axes, train, held_out)
        for verdict in run.turning_points:
            axes.axvline(verdict["step"], color="black", linewidth=0.8, linestyle=":")
            axes.text(
                verdict["step"],
                1.01,
                verdict["verdict"],
                rotation=35,
                rotation_mode="anchor",
                fontsize=9,
                transform=axes.get_xaxis_transform(),
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.legend(fontsize=9, loc="upper right")  # where falling curves leave room
    return svg[0]


def series(run: RunRecord, name: str, label: str) -> str | None:
    """One field of the metrics over steps, such as the learning rate or the throughput."""
    steps, values = run.curve(name)
    if not len(steps):
        return None
    with svg_figure(name, (_SIZE[0], 2.4)) as (axes, svg):
        axes.plot(steps, values, color=_DARK, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    return svg[0]


def confusion_matrix(details: Mapping[str, Any]) -> str | None:
    """Expected label down, answer across; shares of a row in shades of grey, and counts where they fit."""
    confusion = details.get("confusion")
    if not confusion:
        return None
    counts = np.asarray(confusion["counts"], np.float64)
    labels, columns = details["labels"], confusion["columns"]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labelled = len(labels) <= _MOST_LABELLED
    with svg_figure("confusion", (5.2, 4.6)) as (axes, svg):
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.grid(False)
        axes.set_ylabel("expected")
        axes.set_xlabel("answer")
        if labelled:
            axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=9)
            axes.set_yticks(range(len(labels)), labels, fontsize=9)
            for row, column in np.argwhere(counts > 0):
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column, row, f"{counts[row, column]:g}", ha="center", va="center", fontsize=7, color=shade
                )
        else:
            axes.set_xlabel(f"answer ({len(columns)} columns, labels in alphabetical order)")
            axes.set_ylabel(f"expected ({len(labels)} labels)")
            axes.set_xticks([])
            axes.set_yticks([])
    return svg[0]


def length_against_error(predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """The mean score of rows of similar length, with its standard error."""
    if len(predictions) < 10:
        return None
    words = np.array([sum(len(m["content"].split()) for m in row["prompt"]) for row in predictions])
    edges = np.unique(np.quantile(words, np.linspace(0, 1, 6)))
    if len(edges) < 3:
        return None
    bins = np.clip(np.searchsorted(edges, words, side="right") - 1, 0, len(edges) - 2)
    with svg_figure("length") as (axes, svg):
        for name, style in _STYLE.items():
            if name not in predictions[0]:
                continue
            scores = np.array([row[name]["score"] for row in predictions])
            points = [
                (
                    words[bins == b].mean(),
                    scores[bins == b].mean(),
                    scores[bins == b].std() / np.sqrt((bins == b).sum()),
                )
                for b in range(len(edges) - 1)
                if (bins == b).any()
            ]
            centres, means, errors = map(np.array, zip(*points, strict=True))
            axes.errorbar(centres, means, errors, **style, capsize=3, label=name)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("words in the prompt")
        axes.set_ylabel("mean score")
        axes.legend(fontsize=9, loc="lower left")
    return svg[0]


def calibrations(predictions: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, float]]:
    """`reliability` of each model whose rows have a confidence."""
    found = {}
    for name in ("base", "tuned"):
        rows = [row[name] for row in predictions if name in row]
        rows = [row for row in rows if row["confidence"] is not None and row["correct"] is not None]
        if rows:
            said = np.array([row["confidence"] for row in rows])
            found[name] = reliability(said, np.array([row["correct"] for row in rows], float))
    return found


def calibration(predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """Reliability diagram, with the expected calibration error of each model."""
    found = calibrations(predictions)
    if not found:
        return None
    with svg_figure("calibration") as (axes, svg):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="perfect")
        for name, (points, error) in found.items():
            axes.plot(*points, **_STYLE[name], label=f"{name}: error {error:.3f}")
        axes.set_xlabel("confidence")
        axes.set_ylabel("share right")
        axes.legend(fontsize=9, loc="upper left")
    return svg[0]


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> tuple[np.ndarray, float]:
    """Mean confidence and share right, float `[2, bins in use]`, and the expected calibration error.

    Bins are of equal width (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 3).
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    used = [place == index for index in range(bins) if (place == index).any()]
    points = np.array([[confidence[chosen].mean(), correct[chosen].mean()] for chosen in used]).T
    weights = np.array([chosen.mean() for chosen in used])
    return points, float(weights @ np.abs(points[0] - points[1]))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A centred running median over a fortieth of the points, shorter at the ends."""
    half = max(1, len(values) // 80)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _limit_losses(axes: Axes, train: np.ndarray, held_out: np.ndarray) -> None:
    """Keeps single spikes, or a steep beginning, from flattening everything else."""
    values = np.concatenate([_smoothed(train), held_out])
    values = values[np.isfinite(values)]
    if values.size:
        low, high = float(values.min()), float(values.max())
        if 0 < low < high / 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.set_ylim(low / 1.2, high * 1.2)
            return
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(max(0.0, low - margin), high + margin)
