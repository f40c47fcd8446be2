"""`data inspect` on published datasets, from the command line to the page, each figure counted once more.

What is counted here is counted from the files alone, with the csv and json modules, SentencePiece and
scikit-learn.
"""

import csv
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sklearn.feature_extraction.text import CountVectorizer

from keras_gemma_ft import cli
from keras_gemma_ft.config import validate
from keras_gemma_ft.data.from_config import tokenizer_and_recipe
from keras_gemma_ft.data.prepare import prepare
from keras_gemma_ft.data.readers import conversations
from keras_gemma_ft.recipes import read_recipe

FILES = {
    "banking77": ("train.csv", "test.csv"),
    "restaurant8k": ("train_0.json", "test.json"),
    "gsm8k": ("train.jsonl", "test.jsonl"),
}
LENGTHS = {"banking77": 160, "restaurant8k": 256, "gsm8k": 512}


def rows_of(dataset: str, path: Path) -> list[tuple[str, str]]:
    """Questions and answers of a file."""
    text = path.read_text(encoding="utf-8")
    if dataset == "banking77":
        return [
            (f"Classify: {row['text']}", row["category"])
            for row in csv.DictReader(text.splitlines(keepends=True))
        ]
    if dataset == "gsm8k":
        return [(row["question"], row["answer"]) for row in map(json.loads, text.splitlines())]
    found = []
    for row in json.loads(text):
        said, asked = row["userInput"]["text"], row.get("context", {}).get("requestedSlots")
        spans = sorted(  # in the order of the text
            (each["valueSpan"].get("startIndex", 0), each["valueSpan"]["endIndex"], each["slot"])
            for each in row.get("labels", [])
        )
        answer = {slot: said[start:end] for start, end, slot in spans}
        found.append(
            (f"Slots ({', '.join(asked or ['any'])}): {said}", json.dumps(answer, ensure_ascii=False))
        )
    return found


@pytest.fixture(scope="module")
def preset(shared, tmp_path_factory) -> Path:
    """A preset without weights: configuration and vocabulary."""
    folder = tmp_path_factory.mktemp("preset")
    (folder / "config.json").write_bytes((shared / "model_configs/e2b.json").read_bytes())
    (folder / "tokenizer.model").symlink_to(shared / "tokenizer/gemma4.model")
    return folder


@pytest.fixture(scope="module", params=FILES)
def case(request, shared, preset, tmp_path_factory):
    """The dataset, its rows, and what the page's JSON holds."""
    dataset = request.param
    paths = [shared / "datasets" / dataset / name for name in FILES[dataset]]
    page = tmp_path_factory.mktemp(dataset) / "report.html"
    arguments = [
        f"--config=data/{dataset}",
        f"--config.preset={preset}",
        f"--config.data.train={paths[0]}",
        f"--config.data.eval={paths[1]}",
        f"--out={page}",
    ]
    assert cli.main(["data", "inspect", *arguments]) == 0
    figures = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return dataset, [rows_of(dataset, path) for path in paths], figures, page


@pytest.fixture(scope="module")
def tokens(shared):
    """Counts the tokens of a text as the published vocabulary cuts it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizer/gemma4.model"))
    return lambda text: len(processor.encode(text))


def plain(text: str) -> str:
    return " ".join(text.split())


def findings(figures, kind: str) -> list:
    return next((finding["rows"] for finding in figures["findings"] if finding["kind"] == kind), [])


def test_rows_and_tokens(case, tokens):
    dataset, parts, figures, _ = case
    lengths = []
    for name, rows in zip(("train", "held-out"), parts, strict=True):
        part = figures["parts"][name]
        # <bos>, two turns of <|turn> role newline … <turn|> newline; trained are the answer and its <turn|>.
        answers = [tokens(answer.strip()) for _, answer in rows]
        totals = [
            11 + tokens(question.strip()) + answer
            for (question, _), answer in zip(rows, answers, strict=True)
        ]
        fits = [total <= LENGTHS[dataset] for total in totals]
        lengths += totals
        assert part["rows"] == len(rows)
        assert part["problems"] == 0
        assert part["examples"] == sum(fits)
        assert part["too_long"] == part["dropped"] == len(rows) - sum(fits)
        assert part["tokens"] == sum(total for total, fit in zip(totals, fits, strict=True) if fit)
        assert part["trained_tokens"] == sum(
            answer + 1 for answer, fit in zip(answers, fits, strict=True) if fit
        )
        assert part["supervised"] == pytest.approx(part["trained_tokens"] / part["tokens"])
        assert part["efficiency"] == pytest.approx(part["tokens"] / (part["packed_rows"] * LENGTHS[dataset]))
        ordered = sorted(totals)
        assert (part["lengths"]["least"], part["lengths"]["most"]) == (ordered[0], ordered[-1])
        assert part["lengths"]["median"] in ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
        assert part["lengths"]["mean"] == pytest.approx(np.mean(ordered), abs=0.06)
    edges = figures["histogram"]["edges"]
    assert figures["histogram"]["counts"] == [
        sum(low <= length < high for length in lengths) for low, high in pairwise(edges)
    ]
    low, high = np.percentile(np.log2(lengths), [25, 75])
    odd = sum(not low - 3 * (high - low) <= np.log2(n) <= high + 3 * (high - low) for n in lengths)
    assert len(findings(figures, "length")) == odd
    assert len(findings(figures, "too_long")) == sum(length > LENGTHS[dataset] for length in lengths)


def test_packed_rows_are_those_of_training(case, shared, preset, tmp_path):
    dataset, _, figures, _ = case
    config = read_recipe(f"data/{dataset}")
    config.preset = str(preset)
    config.data.train, config.data.eval = (
        str(shared / "datasets" / dataset / name) for name in FILES[dataset]
    )
    validate(config)
    tokenizer, recipe = tokenizer_and_recipe(config)
    for name, rows in zip(("train", "held-out"), conversations(config), strict=True):
        dataset = prepare(rows, tmp_path / name, tokenizer, recipe, {}, workers=1)
        part = figures["parts"][name]
        assert part["packed_rows"] == len(dataset)
        assert part["tokens"] == dataset.manifest["counts"]["tokens"]
        assert part["trained_tokens"] == dataset.manifest["counts"]["trained_tokens"]


def test_copies_conflicts_and_leakage(case):
    _, (train, held_out), figures, _ = case
    train, held_out = ([(plain(q), plain(a)) for q, a in part] for part in (train, held_out))
    copies = sum(len(part) - len(set(part)) for part in (train, held_out))
    assert len(findings(figures, "duplicate")) == copies
    asked = {question for question, _ in train}
    assert len(findings(figures, "leakage")) == sum(question in asked for question, _ in held_out)
    answers: dict[str, set[str]] = {}
    for question, answer in train + held_out:
        answers.setdefault(question, set()).add(answer)
    conflicts = sum(len(answers[question]) > 1 for question, _ in train + held_out)
    assert len(findings(figures, "conflict")) == conflicts


def test_near_duplicates(case):
    """All pairs by a product of sparse matrices; common stretches are left out as the page says."""
    _, (train, held_out), figures, _ = case
    questions = [question for question, _ in train + held_out]
    words = [" ".join(re.findall(r"\w+", question.casefold())) or question for question in questions]
    kinds = sorted(set(words))
    counts = CountVectorizer(analyzer="char", ngram_range=(5, 5), binary=True, max_df=0.1, lowercase=False)
    shingles = counts.fit_transform([kind.ljust(5) for kind in kinds]).astype(np.int32).tocsr()
    sizes = np.asarray(shingles.sum(axis=1)).ravel()
    group = list(range(len(kinds)))

    def root(n: int) -> int:
        while group[n] != n:
            n = group[n]
        return n

    near = 0
    for start in range(0, len(kinds), 500):
        shared_ = (shingles[start : start + 500] @ shingles.T).tocoo()
        rows, columns = shared_.row + start, shared_.col
        alike = (shared_.data >= 0.8 * (sizes[rows] + sizes[columns] - shared_.data) - 1e-9) & (
            rows < columns
        )
        near += alike.sum()
        for a, b in zip(rows[alike].tolist(), columns[alike].tolist(), strict=True):
            group[max(root(a), root(b))] = min(root(a), root(b))
    number = {kind: n for n, kind in enumerate(kinds)}
    groups = [root(number[word]) for word in words]
    expected: Counter[str] = Counter()
    asked: dict[str, set] = {"train": set(), "held-out": set()}
    met: dict[str, set] = {"train": set(), "held-out": set()}
    for n, (question, found) in enumerate(zip(map(plain, questions), groups, strict=True)):
        part = "train" if n < len(train) else "held-out"
        expected["near_duplicate"] += found in met[part] and question not in asked[part]
        expected["near_leakage"] += (
            part == "held-out" and found in met["train"] and question not in asked["train"]
        )
        asked[part].add(question)
        met[part].add(found)
    assert near > 0
    for kind, count in expected.items():
        assert len(findings(figures, kind)) == count


def test_classes(case):
    dataset, (train, held_out), figures, _ = case
    if dataset != "banking77":
        assert figures["classes"] == []
        return
    sizes = [Counter(answer for _, answer in part) for part in (train, held_out)]
    assert {name: (a, b) for name, a, b in figures["classes"]} == {
        name: (sizes[0][name], sizes[1][name]) for name in sizes[0] | sizes[1]
    }
    assert len(figures["classes"]) == 77


def test_other_figures(case):
    dataset, (train, held_out), figures, page = case
    texts = [f"{question} {answer}" for question, answer in train + held_out]
    assert findings(figures, "control_tokens") == []
    assert not any("<|" in text or "|>" in text for text in texts)
    assert findings(figures, "personal") == []
    assert not any(
        re.search(r"@\w+\.\w|\d{3}-\d{2}-\d{4}|(\d[ -]?){13}", text) for text in texts if dataset != "gsm8k"
    )
    assert sum(count for _, count in figures["languages"]) == len(texts)
    answers = Counter(plain(answer) for _, answer in train + held_out)
    questions = {answer: set() for answer in answers}
    for question, answer in train + held_out:
        questions[plain(answer)].add(plain(question))
    repeated = sum(count for answer, count in answers.items() if len(questions[answer]) >= 5)
    assert len(findings(figures, "repeated_answer")) == (0 if figures["classes"] else repeated)
    text = re.sub(r"<[^>]*>", " ", page.read_text(encoding="utf-8"))
    for part in figures["parts"].values():
        for figure in (part["rows"], part["tokens"], part["trained_tokens"], part["packed_rows"]):
            assert f"{figure:,}" in text
