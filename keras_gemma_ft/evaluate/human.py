"""A blind comparison by people: a sheet of answers in shuffled order, and the score of what they chose.

The sheet does not hold which answer is whose: the order follows from a seed that stays in a key file beside
it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.report import template
from keras_gemma_ft.json_files import read_json, read_lines, write_json, write_text

CHOICES = ("A", "B", "tie", "neither")
KEY = "human_key.json"


@dataclass(frozen=True)
class HumanScores:
    """What the judges chose.

    Attributes:
        judges: How many results were read.
        judged: Choices in all.
        tuned, base, tie, neither: How often each was chosen.
        p_value: Two-sided exact sign test of tuned against base, ties left out.
        agreement: Share of equal choices among pairs of judges on the same row; None with a single judge.
    """

    judges: int
    judged: int
    tuned: int
    base: int
    tie: int
    neither: int
    p_value: float
    agreement: float | None

    @property
    def win_rate(self) -> float:
        """Of the tuned model, a tie counting half; rows on which neither was good are left out."""
        decided = self.tuned + self.base + self.tie
        return (self.tuned + 0.5 * self.tie) / decided if decided else 0.5


def main(workdir: str | Path, results: Sequence[str], rows: int) -> None:
    """The verb `evaluate human`: writes the sheet, or with `results` scores them."""
    if not results:
        path = write_sheet(workdir, rows=rows)
        print(f"for the judges: {path}\nnot for them:   {path.with_name(KEY)}")
        return
    scores = collect(workdir, results)
    print(
        f"{scores.judged:,} choices of {scores.judges} judges: tuned {scores.tuned}, base {scores.base}, "
        f"tie {scores.tie}, neither {scores.neither}\n"
        f"tuned wins {scores.win_rate:.1%} of what was decided, ties counting half (p = {scores.p_value:.3f})"
    )
    if scores.agreement is not None:
        print(f"the judges agree on {scores.agreement:.1%}")


def write_sheet(directory: str | Path, *, rows: int = 50, seed: int = 0) -> Path:
    """Writes `human.html` and its key from the answers in a run's `predictions.jsonl`.

    Args:
        directory: A run directory that was evaluated with its base.
        rows: How many to judge at most, drawn at random among those whose two answers differ.
        seed: Of the draw and of the order of each pair.

    Returns:
        The path of the sheet; the key is `human_key.json` beside it, not for the judges.

    Raises:
        UserError: There are no predictions of both models, or no two answers differ.
    """
    directory = Path(directory)
    path = directory / "predictions.jsonl"
    if not path.exists():
        raise UserError(
            "there are no answers to compare", where=str(path), remedy="run `keras-gemma-ft evaluate` first."
        )
    predictions = [row for row in read_lines(path) if "base" in row and "tuned" in row]
    differing = [row for row in predictions if row["base"]["answer"] != row["tuned"]["answer"]]
    if not differing:
        raise UserError(
            "no row has two different answers of base and tuned",
            where=str(path),
            remedy="evaluate with the base model too, on a task with generated answers.",
        )
    generator = random.Random(seed)
    chosen = generator.sample(differing, min(rows, len(differing)))
    items, order = [], {}
    for number, row in enumerate(chosen, 1):
        sides = ["base", "tuned"]
        generator.shuffle(sides)
        order[str(number)] = {"A": sides[0], "B": sides[1], "origin": row["origin"]}
        items.append(
            {
                "id": str(number),
                "prompt": row["prompt"],
                "A": row[sides[0]]["answer"],
                "B": row[sides[1]]["answer"],
            }
        )
    sheet = f"{generator.getrandbits(64):016x}"
    html = template("human.html.jinja").render(items=items, sheet=sheet, choices=CHOICES)
    write_json(directory / KEY, {"sheet": sheet, "seed": seed, "order": order})
    write_text(directory / "human.html", html)
    return directory / "human.html"


def collect(directory: str | Path, results: Sequence[str | Path]) -> HumanScores:
    """Scores the files that judges saved from the sheet, and writes `human.json` into the run directory.

    Raises:
        UserError: A file belongs to another sheet or is malformed, or nothing was judged.
    """
    directory = Path(directory)
    if not (directory / KEY).exists():
        raise UserError(
            "the key of the sheet is missing", where=str(directory / KEY), remedy="write the sheet again."
        )
    key = read_json(directory / KEY)
    answers = [_read_result(path, key) for path in results]
    counts = Counter(choice for answer in answers for choice in answer.values())
    if not counts:
        raise UserError("no row was judged", where=", ".join(map(str, results)) or "results")
    scores = HumanScores(
        judges=len(answers),
        judged=counts.total(),
        tuned=counts["tuned"],
        base=counts["base"],
        tie=counts["tie"],
        neither=counts["neither"],
        p_value=_sign_test(counts["tuned"], counts["base"]),
        agreement=_agreement(answers),
    )
    write_json(directory / "human.json", {**vars(scores), "win_rate": scores.win_rate})
    return scores


def _read_result(path: str | Path, key: Mapping[str, Any]) -> dict[str, str]:
    """Row to "tuned", "base", "tie" or "neither"."""
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("choices"), dict):
        raise UserError(
            "is no result of a sheet", where=str(path), remedy="save it with the sheet's own button."
        )
    if result.get("sheet") != key["sheet"]:
        raise UserError(
            "belongs to another sheet",
            where=str(path),
            remedy="collect results with the run they were judged for.",
        )
    choices = {}
    for row, choice in result["choices"].items():
        if row not in key["order"] or choice not in CHOICES:
            raise UserError(f"row {row!r} cannot be {choice!r}", where=str(path))
        choices[row] = key["order"][row].get(choice, choice)
    return choices


def _sign_test(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _agreement(answers: Sequence[Mapping[str, str]]) -> float | None:
    equal = [
        one[row] == other[row] for one, other in combinations(answers, 2) for row in one.keys() & other.keys()
    ]
    return sum(equal) / len(equal) if equal else None
