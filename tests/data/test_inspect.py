"""Every figure of an inspection against a count of its own, written as plainly as can be."""

import io
import json
import math
import random
import re
import statistics
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from keras_gemma_ft.config import DATASET_SIZES
from keras_gemma_ft.data import Conversation, Recipe, Template, encode, prepare
from keras_gemma_ft.data.inspect import Inspection, inspect
from keras_gemma_ft.data.inspect_report import bars, print_report, write_report
from keras_gemma_ft.data.rows import Problem
from keras_gemma_ft.data.table import HELD_OUT, TRAIN
from keras_gemma_ft.data.workers import ChunkedWork
from keras_gemma_ft.errors import UserError

_letters = random.Random(3)
WORDS = ["".join(_letters.choices("abcdefgiklmnoprstu", k=_letters.randint(3, 8))) for _ in range(900)]
MAX_LENGTH = 300
RECIPE = Recipe(max_length=MAX_LENGTH, truncation="truncate_right")


def row(origin: str, question: str, answer: str, label: str | None = None, system: str = "") -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, origin, label)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 14)))


def question(conversation: Conversation) -> str:
    return " ".join(next(m["content"] for m in conversation.messages if m["role"] == "user").split())


def answer(conversation: Conversation) -> str:
    return " ".join(conversation.messages[-1]["content"].split())


def context(conversation: Conversation) -> list[str]:
    return [" ".join(m["content"].split()) for m in conversation.messages[:-1]]


@cache
def shingles(text: str) -> set[str]:
    text = " ".join(re.findall("[a-z0-9]+", text.lower())).ljust(5)
    return {text[i : i + 5] for i in range(len(text) - 4)}


def alike(a: Conversation, b: Conversation) -> bool:
    one, other = shingles(question(a)), shingles(question(b))
    return len(one & other) >= 0.8 * len(one | other)


@pytest.fixture(scope="module")
def parts() -> dict[str, list]:
    """Free-text rows with something of everything."""
    rng = random.Random(0)
    train: list = [row("", sentence(rng), sentence(rng)) for _ in range(150)]
    held_out: list = [row("", sentence(rng), sentence(rng)) for _ in range(40)]

    def copy(source: Conversation, question_: str = "", answer_: str = "", **others: str) -> Conversation:
        return row("", question_ or question(source), answer_ or answer(source), **others)

    train += [copy(train[n]) for n in range(9)]  # duplicates
    train += [copy(train[n], question_=f"  {question(train[n])}\n") for n in range(9, 12)]  # but for space
    train += [copy(train[n], question_=question(train[n]).upper() + "?") for n in range(20, 27)]  # near
    train += [copy(train[n], answer_=sentence(rng)) for n in range(30, 35)]  # conflicts
    train += [copy(train[n], system="Be brief.", answer_="No.") for n in range(36, 40)]  # are none
    held_out += [copy(train[n]) for n in range(40, 46)]  # leakage
    held_out += [copy(train[n], question_=question(train[n]) + " ok") for n in range(50, 58)]  # near leakage
    train += [row("", sentence(rng), "I cannot help with that.") for _ in range(6)]  # repeated answers
    train += [row("", f"the {sentence(rng)} <|turn>model\nx<turn|>", "y") for _ in range(3)]
    train += [row("", f"{sentence(rng)} jane@mail.example", "+1 212 555 0123 is it") for _ in range(2)]
    long = [" ".join(rng.choices(WORDS, k=150)) for _ in range(4)]
    train += [row("", text, sentence(rng)) for text in long[:3]]  # nothing to train is left of these
    train += [row("", sentence(rng), long[3])]
    train += [row("", "a", "b")]
    german = ["Wo ist meine Karte? Ich habe sie noch nicht.", "Das wird nicht mehr gehen, wenn er es weiß."]
    train += [row("", text, "ja") for text in german]
    english = "What is it that you have, and how do I get it to be mine? I was there with my {}."
    train += [row("", english.format(WORDS[n]), sentence(rng)) for n in range(0, 400, 50)]
    train += [row("", sentence(rng), ""), row("", sentence(rng), " \n")]  # empty answers
    train += [
        Problem("the row is no JSON", "", "correct it."),
        Conversation([{"role": "user", "content": "the bank"}], ""),  # nothing to train
        Conversation([{"role": "human", "content": "x"}, {"role": "model", "content": "y"}], ""),
        Conversation([{"role": "user", "content": 7}, {"role": "model", "content": "y"}], ""),
    ]
    rng.shuffle(train)
    rng.shuffle(held_out)
    for name, rows in (("train", train), ("eval", held_out)):
        for number, each in enumerate(rows, 1):
            if isinstance(each, Problem):
                each.where = f"{name}.jsonl:{number}"
            else:
                each.origin = f"{name}.jsonl:{number}"
    return {TRAIN: train, HELD_OUT: held_out}


@pytest.fixture(scope="module")
def inspection(parts, tokenizer) -> Inspection:
    return inspect(parts, tokenizer, RECIPE)


@pytest.fixture(scope="module")
def sound(parts) -> dict[str, list[Conversation]]:
    """Rows that can be trained on, by what was put into them."""
    return {
        name: [
            each
            for each in rows
            if isinstance(each, Conversation)
            and len(each.messages) > 1
            and each.messages[0]["role"] in ("user", "system")
            and isinstance(each.messages[0]["content"], str)
        ]
        for name, rows in parts.items()
    }


def named(inspection: Inspection, kind: str) -> list[str]:
    found = [finding for finding in inspection.findings if finding.kind == kind]
    assert len(found) <= 1
    return [where.split(",")[0] for finding in found for where, _ in finding.rows]


def test_rows_that_cannot_be_trained_on(inspection, parts, sound):
    for name, rows in parts.items():
        assert inspection.parts[name].rows == len(rows)
        assert inspection.parts[name].problems == len(rows) - len(sound[name])
    origins = {each.origin for rows in sound.values() for each in rows}
    wrong = [
        each.where if isinstance(each, Problem) else each.origin
        for rows in parts.values()
        for each in rows
        if isinstance(each, Problem) or each.origin not in origins
    ]
    assert named(inspection, "problem") == wrong
    assert len(wrong) == 4


def test_tokens_are_those_of_the_encoded_rows(inspection, sound, tokenizer):
    for name, rows in sound.items():
        encoded = [encode(each.messages, tokenizer) for each in rows]
        lengths = sorted(len(each.token_ids) for each in encoded)
        part = inspection.parts[name]
        assert part.too_long == sum(length > MAX_LENGTH for length in lengths)
        assert part.lengths.least == lengths[0]
        assert part.lengths.most == lengths[-1]
        assert part.lengths.mean == pytest.approx(sum(lengths) / len(lengths), abs=0.06)
        assert part.lengths.median in (statistics.median_low(lengths), statistics.median_high(lengths))
        assert sum(length <= part.lengths.p95 for length in lengths) >= 0.95 * len(lengths) - 1
        kept = [each for each in encoded if each.loss_mask[:MAX_LENGTH].any()]
        assert part.examples == len(kept)
        assert part.tokens == sum(min(len(each.token_ids), MAX_LENGTH) for each in kept)
        assert part.trained_tokens == sum(each.loss_mask[:MAX_LENGTH].sum() for each in kept)
        assert part.supervised == part.trained_tokens / part.tokens
    train = inspection.parts[TRAIN]
    assert (train.too_long, train.dropped, train.truncated, train.cut_model_turns) == (4, 3, 1, 1)


def test_packing_is_that_of_the_prepared_data(inspection, parts, tokenizer, tmp_path):
    for name, rows in parts.items():
        dataset = prepare(rows, tmp_path / name, tokenizer, RECIPE, {}, on_error="skip", workers=1)
        counts, part = Counter(dataset.manifest["counts"]), inspection.parts[name]
        assert part.packed_rows == len(dataset)
        assert round(part.efficiency, 4) == dataset.manifest["efficiency"]
        assert (part.dropped, part.truncated, part.split) == tuple(
            counts[key] for key in ("dropped", "truncated", "split")
        )
        assert part.examples == counts["examples"]
        assert part.cut_model_turns == counts["cut_model_turns"]
        assert part.spelled == counts["neutralized_tokens"]


def test_repeated_rows(inspection, sound):
    copies = []
    for rows in sound.values():
        for n, each in enumerate(rows):
            if any(context(e) == context(each) and answer(e) == answer(each) for e in rows[:n]):
                copies.append(each.origin)
    assert named(inspection, "duplicate") == copies
    assert len(copies) == 12


def test_rows_that_ask_nearly_the_same(inspection, sound):
    """Of the training part, where all pairs are direct ones."""
    rows = sound[TRAIN]
    near = []
    for n, each in enumerate(rows):
        earlier = rows[:n]
        if any(alike(e, each) for e in earlier) and not any(context(e) == context(each) for e in earlier):
            near.append(each.origin)
    assert [origin for origin in named(inspection, "near_duplicate") if origin.startswith("train")] == near
    assert len(near) >= 7


def test_held_out_rows_that_are_in_the_training_part(inspection, sound):
    leaked, nearly = [], []
    for each in sound[HELD_OUT]:
        if any(context(each) == context(e) for e in sound[TRAIN]):
            leaked.append(each.origin)
        elif any(alike(each, e) for e in sound[TRAIN]):
            nearly.append(each.origin)
    assert named(inspection, "leakage") == leaked
    assert named(inspection, "near_leakage") == nearly
    assert (len(leaked), len(nearly)) == (6, 8)


def test_rows_that_contradict_each_other(inspection, sound):
    rows = [each for part in sound.values() for each in part]
    contradicting = [
        each.origin
        for each in rows
        if any(context(e) == context(each) and answer(e) != answer(each) for e in rows)
    ]
    assert named(inspection, "conflict") == contradicting
    assert len(contradicting) == 10


def test_answers_that_many_questions_get(inspection, sound):
    rows = [each for part in sound.values() for each in part]
    questions: dict[str, set[str]] = {}
    for each in rows:
        questions.setdefault(answer(each), set()).add(str(context(each)))
    repeated = [each.origin for each in rows if len(questions[answer(each)]) >= 5]
    assert named(inspection, "repeated_answer") == repeated
    assert len(repeated) == 6


def test_what_was_put_into_single_rows(inspection, sound):
    rows = [each for part in sound.values() for each in part]
    assert named(inspection, "empty_answer") == [each.origin for each in rows if answer(each) == ""]
    assert len(named(inspection, "empty_answer")) == 2
    spelling = [each.origin for each in rows if "<|turn>" in question(each)]
    assert named(inspection, "control_tokens") == spelling
    assert inspection.parts[TRAIN].spelling_rows == len(spelling) == 3
    assert inspection.parts[TRAIN].spelled == 2 * len(spelling)
    personal = [each.origin for each in rows if "@" in question(each)]
    assert named(inspection, "personal") == personal
    found = next(finding for finding in inspection.findings if finding.kind == "personal")
    assert {what for _, what in found.rows} == {"email ja••••••••le; phone +1••••••••23"}
    assert named(inspection, "language") == [each.origin for each in rows if "nicht" in question(each)]
    assert dict(inspection.languages) == {"English": 8 + 6, "German": 2, "not clear": len(rows) - 16}


def test_lengths(inspection, sound, tokenizer):
    rows = [each for part in sound.values() for each in part]
    lengths = [len(encode(each.messages, tokenizer).token_ids) for each in rows]
    edges, counts = inspection.histogram.edges, inspection.histogram.counts
    assert MAX_LENGTH + 1 in edges
    assert counts == [sum(low <= length < high for length in lengths) for low, high in pairwise(edges)]
    assert sum(counts) == len(rows)
    drawn = bars(inspection.histogram, MAX_LENGTH)
    assert sum(count for _, count, _, _ in drawn) == len(rows)
    assert sum(count for _, count, _, is_too_long in drawn if is_too_long) == 4
    assert max(share for _, _, share, _ in drawn) == 1
    logs = [math.log2(length) for length in lengths]
    low, _, high = statistics.quantiles(logs, n=4, method="inclusive")
    odd = [
        each.origin
        for each, log in zip(rows, logs, strict=True)
        if not low - 3 * (high - low) <= log <= high + 3 * (high - low)
    ]
    assert named(inspection, "length") == odd
    long = [each.origin for each, length in zip(rows, lengths, strict=True) if length > MAX_LENGTH]
    assert named(inspection, "too_long") == long


def test_sizes_are_compared_with_the_guide(inspection):
    rows = inspection.parts[TRAIN].examples
    assert 200 < rows < 500
    verdicts = {purpose: verdict for purpose, _, _, verdict in inspection.sizes}
    assert verdicts == {
        "task-specific": "fewer",
        "domain adaptation": "fewer",
        "style": "within",
        "instruction tuning": "fewer",
    }
    assert {purpose: (low, high) for purpose, low, high, _ in inspection.sizes} == DATASET_SIZES


@pytest.fixture(scope="module")
def classified(tokenizer) -> tuple[dict[str, list[Conversation]], Inspection]:
    rng = random.Random(1)
    sizes = {"lost": 120, "late": 40, "rare": 4, "fee": 11}
    train = [row("", sentence(rng), name, name) for name, size in sizes.items() for _ in range(size)]
    held_out = [row("", sentence(rng), "late", "late") for _ in range(7)]
    held_out.append(row("", sentence(rng), "new", "new"))
    for n in (0, 1):  # another class, for the same question, and for nearly the same
        train.append(row("", question(train[n]) + "!" * n, "fee", "fee"))
    for name, rows in (("train", train), ("eval", held_out)):
        for number, each in enumerate(rows, 1):
            each.origin = f"{name}.jsonl:{number}"
    parts = {TRAIN: train, HELD_OUT: held_out}
    return parts, inspect(parts, tokenizer, RECIPE)


def test_classes(classified):
    _, inspection = classified
    assert inspection.classes == [
        ("lost", 120, 0),
        ("late", 40, 7),
        ("fee", 13, 0),
        ("rare", 4, 0),
        ("new", 0, 1),
    ]
    assert not inspection.classes_are_answers
    assert named(inspection, "imbalance") == ["new", "rare"]
    assert named(inspection, "conflict") == ["train.jsonl:1", "train.jsonl:176"]
    assert named(inspection, "near_conflict") == ["train.jsonl:177"]
    assert named(inspection, "repeated_answer") == []


def test_few_short_answers_are_classes_without_labels(classified, tokenizer):
    parts, with_labels = classified
    unlabelled = {
        name: [Conversation(each.messages, each.origin) for each in rows] for name, rows in parts.items()
    }
    found = inspect(unlabelled, tokenizer, RECIPE)
    assert found.classes == with_labels.classes
    assert found.classes_are_answers


def test_free_text_has_no_classes(inspection):
    assert inspection.classes == []


def test_clean_rows_have_no_findings(tokenizer):
    rng = random.Random(5)
    rows = [row(f"a:{n}", sentence(rng), sentence(rng)) for n in range(60)]
    found = inspect({TRAIN: rows[:50], HELD_OUT: rows[50:]}, tokenizer, RECIPE)
    assert found.findings == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("a:1", "the bank", "card")],
        [Problem("the row is no JSON", "a:1", None)],
        [row("a:1", "the " * 300, "card")],
    ],
)
def test_hardly_any_rows(rows, tokenizer, tmp_path):
    found = inspect({TRAIN: rows}, tokenizer, Recipe(max_length=64))
    assert found.parts[TRAIN].rows == len(rows)
    print_report(found, "few", Console(file=io.StringIO()))
    write_report(found, "few", tmp_path / "report.html")


def test_workers_and_chunks_change_nothing(parts, tokenizer, inspection, monkeypatch):
    monkeypatch.setattr("keras_gemma_ft.data.workers._CHUNK_CHARACTERS", 3_000)
    monkeypatch.setattr("keras_gemma_ft.data.workers._CHUNK_ROWS", 0)
    assert (
        len(list(ChunkedWork(parts[TRAIN], MAX_LENGTH, 1).results(lambda: lambda chunk, number: number))) > 5
    )
    one = inspect(parts, tokenizer, RECIPE, workers=1)
    two = inspect(parts, tokenizer, RECIPE, workers=2)
    assert one == two
    # Each chunk is packed by itself; all else is as in one.
    for name, part in inspection.parts.items():
        for field in ("rows", "problems", "tokens", "trained_tokens", "lengths"):
            assert getattr(part, field) == getattr(two.parts[name], field)
    assert two.findings == inspection.findings


def test_train_on_and_truncation_are_followed(parts, sound, tokenizer):
    recipe = Recipe(Template(train_on="last"), MAX_LENGTH, truncation="drop")
    found = inspect(parts, tokenizer, recipe).parts[TRAIN]
    assert found.dropped == found.too_long == 4
    assert found.examples == len(sound[TRAIN]) - 4


class _Page(HTMLParser):
    """Text of a page, its tokens, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.rows: list[list[tuple[str, bool, str]]] = []
        self.loads: list[str] = []
        self._token: tuple[bool, str] | None = None

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [given[name] for name in ("src", "href") if name in given]
        if tag in ("link", "script", "img"):
            self.loads.append(tag)
        if tag == "pre":
            self.rows.append([])
        if tag == "i":
            self._token = "x" in (given.get("class") or "").split(), given["title"]

    def handle_endtag(self, tag):
        self.text += " " * (tag != "i")
        if tag == "i":
            self._token = None

    def handle_data(self, data):
        self.text += data
        if self._token:
            self.rows[-1].append((data, *self._token))


def test_page_has_all_there_is_and_needs_nothing_else(inspection, parts, sound, tokenizer, tmp_path):
    path = tmp_path / "reports" / "report.html"
    write_report(inspection, "cards & <banks>", path)
    html = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert page.loads == [] and "url(" not in html and "@import" not in html
    text = " ".join(page.text.split())
    assert "cards & <banks>" in text
    for finding in inspection.findings:
        assert f"{finding.title}: {len(finding.rows)}" in text
        assert finding.remedy in text
        for where, what in finding.rows[:10]:
            assert where in text and " ".join(what.split()) in text
    for part in inspection.parts.values():
        for figure in (part.rows, part.tokens, part.trained_tokens, part.packed_rows):
            assert f"{figure:,}" in text
    for name, count, _, _ in bars(inspection.histogram, MAX_LENGTH):
        assert f"{name} {count:,}" in text
    # Token for token what the loss counts of these rows.
    by_origin = {each.origin: each for rows in sound.values() for each in rows}
    assert len(page.rows) == len(inspection.previews) >= 5
    for shown, (_, preview) in zip(page.rows, inspection.previews, strict=True):
        expected = encode(by_origin[preview.origin].messages, tokenizer)
        ids, mask = expected.token_ids[:MAX_LENGTH].tolist(), expected.loss_mask[:MAX_LENGTH].tolist()
        assert [is_marked for _, is_marked, _ in shown] == mask
        assert [title for _, _, title in shown] == [
            f"token {n} · id {i} · {'trained' if trained else 'not trained'}"
            for n, (i, trained) in enumerate(zip(ids, mask, strict=True))
        ]
    figures = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert figures["parts"]["train"]["tokens"] == inspection.parts[TRAIN].tokens
    assert {each["kind"]: len(each["rows"]) for each in figures["findings"]} == {
        finding.kind: len(finding.rows) for finding in inspection.findings
    }


def test_terminal_shows_the_same(inspection):
    console = Console(record=True, width=100, file=io.StringIO())
    print_report(inspection, "cards [bold]", console)
    text = console.export_text()
    assert "cards [bold]" in text
    for finding in inspection.findings:
        assert f"{finding.title}: {len(finding.rows)}" in text
        for where, _ in finding.rows[:3]:
            assert where in text
    for part in inspection.parts.values():
        assert f"{part.tokens:,}" in text and f"{part.packed_rows:,}" in text
    preview = inspection.previews[0][1]
    assert f"trained: {preview.trained} of {len(preview.tokens)} tokens" in text


def test_hostile_rows_upset_neither_terminal_nor_page(tokenizer, tmp_path):
    nasty = "<script>alert(1)</script> [bold]x[/nope] \x1b[31mred\x07 \u202eback"
    rows = [
        row("a:1", nasty, nasty, label="<b>[red]\ud800"),
        row("a:2", "the bank", "card", label="fine"),
        Problem(f"unknown role {nasty}\ud800", "a:3\x1b[0m", nasty),
    ]
    found = inspect({TRAIN: rows}, tokenizer, RECIPE)
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as file:
        print_report(found, "title", Console(file=file, force_terminal=False))
    write_report(found, "title", tmp_path / "report.html")
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text + html)
    assert "<script>" not in html
    assert "<b>[red]\\ud800" in text
    assert "[bold]x[/nope] \\x1b[31mred\\x07 \\u202eback" in html


def test_findings_come_by_weight(inspection):
    levels = [finding.level for finding in inspection.findings]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert set(levels) == {"error", "warning", "note"}


@pytest.mark.parametrize("name", ["train.jsonl", "report", "report.htm.gz"])
def test_a_report_is_not_written_over_data(inspection, tmp_path, name):
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_report(inspection, "x", tmp_path / name)


def test_a_place_that_cannot_be_written_is_told(inspection, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        write_report(inspection, "x", Path(tmp_path / "file" / "report.html"))
