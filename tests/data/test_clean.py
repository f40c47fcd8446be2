"""Cleaned copies: what is dropped, held out and balanced, each against plain rules; nothing else changes."""

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from keras_gemma_ft import cli
from keras_gemma_ft.config import default_config
from keras_gemma_ft.data.clean import Cleaned, clean, main, records
from keras_gemma_ft.data.readers import conversations
from keras_gemma_ft.data.rows import Conversation, Problem
from keras_gemma_ft.errors import UserError

_letters = random.Random(3)
WORDS = ["".join(_letters.choices("abcdefgiklmnoprstu", k=_letters.randint(3, 8))) for _ in range(900)]


def row(origin: str, question: str, answer: str, label: str | None = None) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "model", "content": answer}]
    return Conversation(messages, origin, label)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(6, 14)))


def texts(conversation: Conversation) -> tuple[str, str]:
    question, answer = (message["content"] for message in conversation.messages)
    return question, answer


@cache
def shingles(text: str) -> set[str]:
    text = " ".join(re.findall("[a-z0-9]+", text.lower())).ljust(5)
    return {text[i : i + 5] for i in range(len(text) - 4)}


def alike(a: str, b: str) -> bool:
    return len(shingles(a) & shingles(b)) >= 0.8 * len(shingles(a) | shingles(b))


def classified(seed: int = 0) -> list[Conversation]:
    """Rows of three classes, of which many come in several versions."""
    rng = random.Random(seed)
    rows = []
    for label, size in (("lost", 150), ("late", 60), ("fee", 40)):
        for _ in range(size):
            question = sentence(rng)
            rows.append(row("", question, label, label))
            if rng.random() < 0.3:
                rows.append(row("", question.upper(), label, label))
            if rng.random() < 0.3:
                rows.append(row("", f"{question} {rng.choice(WORDS)}", label, label))
            if rng.random() < 0.1:
                rows.append(row("", question, label, label))
            if rng.random() < 0.1:
                rows.append(row("", f"{rng.choice(WORDS)} {question}", "fee", "fee"))
    rng.shuffle(rows)
    for number, each in enumerate(rows, 1):
        each.origin = f"train.csv:{number}"
    return rows


def test_copies_go_and_the_first_of_them_stays():
    rows = classified()
    cleaned = clean(rows, dedupe="exact")
    seen, expected = set(), []
    for each in rows:
        if texts(each) in seen:
            expected.append(each.origin)
        seen.add(texts(each))
    assert [change.row for change in cleaned.log] == expected
    assert len(expected) > 5
    assert all(re.fullmatch(r"copy: the same as train\.csv:\d+", change.reason) for change in cleaned.log)


def test_near_copies_go_only_where_answers_agree():
    rows = classified()
    cleaned = clean(rows, dedupe="near")
    kept = [*cleaned.train, *cleaned.held_out]
    for a, b in itertools.combinations(kept, 2):
        assert not (alike(texts(a)[0], texts(b)[0]) and texts(a)[1] == texts(b)[1])
    # Nothing went without an earlier row that is like it and stayed.
    position = {each.origin: n for n, each in enumerate(rows)}
    stayed = {each.origin for each in kept}
    near = [change for change in cleaned.log if change.reason.startswith("near copy")]
    assert len(near) > 50
    for change in near:
        other = re.match(r"near copy: of (\S+)", change.reason)[1]
        here, there = rows[position[change.row]], rows[position[other]]
        assert other in stayed or other in {c.row for c in cleaned.log}
        assert position[other] < position[change.row]
        assert alike(texts(here)[0], texts(there)[0]) and texts(here)[1] == texts(there)[1]


def test_alike_answers_count_as_agreeing_in_free_text():
    rng = random.Random(0)
    rows = [row(f"a:{n}", sentence(rng), sentence(rng)) for n in range(60)]
    rows.append(row("a:near", texts(rows[0])[0].upper(), texts(rows[0])[1] + "."))
    rows.append(row("a:other", texts(rows[1])[0].upper(), sentence(rng)))
    log = clean(rows).log
    assert [change.row for change in log] == ["a:near"]
    assert log[0].reason == "near copy: of a:0 (1.00)"


@pytest.mark.parametrize("dedupe", ["off", "exact", "near"])
@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_held_out_rows_are_stratified_and_resemble_no_training_row(dedupe, fraction):
    cleaned = clean(classified(), dedupe=dedupe, fraction=fraction)
    for held in cleaned.held_out:
        assert not any(alike(texts(held)[0], texts(other)[0]) for other in cleaned.train)
    total = len(cleaned.train) + len(cleaned.held_out)
    assert len(cleaned.held_out) == pytest.approx(fraction * total, abs=5)
    held, all_ = (
        Counter(each.label for each in part)
        for part in (cleaned.held_out, [*cleaned.train, *cleaned.held_out])
    )
    for label, count in all_.items():
        assert held[label] == pytest.approx(fraction * count, abs=4)


def test_every_row_is_somewhere_and_as_it_was():
    rows = classified()
    before = {each.origin: json.dumps(each.messages) for each in rows}
    problems = [Problem("the row is no JSON", "train.csv:900", "correct it.")]
    cleaned = clean([*rows, *problems], balance="down_sample")
    dropped = [change.row for change in cleaned.log]
    kept = [each.origin for each in (*cleaned.train, *cleaned.held_out)]
    assert sorted([*dropped, *kept]) == sorted([*before, "train.csv:900"])
    for each in (*cleaned.train, *cleaned.held_out):
        assert json.dumps(each.messages) == before[each.origin]
    order = [each.origin for each in rows]
    for part in (cleaned.train, cleaned.held_out):
        places = [order.index(each.origin) for each in part]
        assert places == sorted(places)
    assert {change.reason for change in cleaned.log if change.row == "train.csv:900"} == {
        "the row is no JSON"
    }


def _everything(cleaned: Cleaned) -> str:
    return json.dumps(
        [
            list(records(cleaned.train, cleaned.weights)),
            list(records(cleaned.held_out)),
            list(map(vars, cleaned.log)),
        ]
    )


@pytest.mark.parametrize("balance", ["off", "down_sample", "weights"])
def test_same_seed_same_rows(balance):
    first = _everything(clean(classified(), balance=balance, seed=3))
    assert first == _everything(clean(classified(), balance=balance, seed=3))
    assert first != _everything(clean(classified(), balance=balance, seed=4))


def test_cleaning_again_drops_nothing():
    once = clean(classified())
    again = clean(once.train, once.held_out)
    assert again.log == []
    assert (again.train, again.held_out) == (once.train, once.held_out)


def test_down_sampling_leaves_equally_many_of_each_class():
    cleaned = clean(classified(), balance="down_sample")
    whole = Counter(each.label for each in clean(classified()).train)
    sizes = Counter(each.label for each in cleaned.train)
    assert set(sizes.values()) == {min(whole.values())}
    gone = [change for change in cleaned.log if change.reason.startswith("balance")]
    assert len(gone) == whole.total() - sizes.total()
    assert len(cleaned.held_out) == len(clean(classified()).held_out)


def test_weights_are_those_of_scikit_learn():
    cleaned = clean(classified(), balance="weights")
    labels = [each.label for each in cleaned.train]
    classes = np.array(sorted(set(labels)))
    expected = dict(zip(classes, compute_class_weight("balanced", classes=classes, y=labels), strict=True))
    assert cleaned.weights == pytest.approx([expected[label] for label in labels], abs=1e-4)
    written = list(records(cleaned.train, cleaned.weights))
    assert [record["weight"] for record in written] == cleaned.weights
    assert all("weight" not in record for record in records(cleaned.held_out))
    by_class = Counter()
    for record in written:
        by_class[record["label"]] += record["weight"]  # copies of its rows in an epoch, on average
    assert list(by_class.values()) == pytest.approx([len(written) / len(classes)] * len(classes), abs=0.01)


def test_free_text_is_not_balanced():
    rng = random.Random(0)
    rows = [row(f"a:{n}", sentence(rng), sentence(rng)) for n in range(50)]
    assert clean(rows, balance="weights").weights is None
    assert clean(rows, balance="down_sample").log == []


def test_a_given_held_out_part_stays_and_training_rows_that_ask_the_same_go():
    rng = random.Random(0)
    train = [row(f"train:{n}", sentence(rng), sentence(rng)) for n in range(50)]
    held_out = [row(f"eval:{n}", sentence(rng), sentence(rng)) for n in range(10)]
    held_out.append(row("eval:copy", *texts(held_out[3])))
    train.append(row("train:same", texts(held_out[0])[0], "another answer"))
    train.append(row("train:near", texts(held_out[1])[0] + " ok", "another answer"))
    cleaned = clean(train, held_out)
    assert [each.origin for each in cleaned.held_out] == [f"eval:{n}" for n in range(10)]
    assert [each.origin for each in cleaned.train] == [f"train:{n}" for n in range(50)]
    assert [(change.row, change.reason.split("(")[0]) for change in cleaned.log] == [
        ("eval:copy", "copy: the same as eval:3"),
        ("train:same", "held out: eval:0 asks the same"),
        ("train:near", "held out: eval:1 asks nearly the same "),
    ]


def _config(train: Path, **fields: object):
    config = default_config()
    config.data.train = str(train)
    config.task.kind = "classification"
    for name, value in fields.items():
        group, _, leaf = name.partition("__")
        config[group][leaf] = value
    return config


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    lines = []
    for each in classified():
        question, answer = texts(each)
        lines.append(
            json.dumps(
                {
                    "messages": [
                        {"role": "human", "content": question + "\r\n"},
                        {"role": "gpt", "content": answer},
                    ]
                }
            )
        )
    lines[4:4] = ['{"messages": 3}', "no JSON", '{"messages": [{"role": "user", "content": "x"}]}']
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_files_are_written_and_can_be_read_again(source, tmp_path, capsys):
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    out = tmp_path / "cleaned"
    cleaned = main(_config(source), out)
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert sorted(path.name for path in out.iterdir()) == ["eval.jsonl", "log.jsonl", "train.jsonl"]
    read = {
        name: list(map(json.loads, (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()))
        for name in ("train", "eval", "log")
    }
    assert read["train"] == list(records(cleaned.train))
    assert read["eval"] == list(records(cleaned.held_out))
    assert read["train"][0]["messages"][0]["role"] == "user"
    assert not read["train"][0]["messages"][0]["content"].endswith("\n")
    log = {entry["row"].removeprefix(f"{source}:"): entry for entry in read["log"]}
    assert {place.split(",")[0] for place in log} == {
        str(n) for n in range(1, len(source.read_text().splitlines()) + 1)
    }
    assert [log[place]["action"] for place in log if place.split(",")[0] in ("5", "6", "7")] == [
        "dropped"
    ] * 3
    changed = [entry["reason"] for entry in read["log"] if entry["action"] == "changed"]
    assert set(changed) == {"role 'human' is user; role 'gpt' is model; white space"}
    printed = capsys.readouterr().out
    assert f"{len(cleaned.train):,} rows to train on, {len(cleaned.held_out):,} held out" in printed
    # The copy is a dataset like any other, and clean.
    again = main(_config(out / "train.jsonl", data__eval=str(out / "eval.jsonl")), tmp_path / "again")
    assert again.log == []
    for name in ("train", "eval"):
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (out / f"{name}.jsonl").read_bytes()


def test_the_command_line_cleans(source, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from keras_gemma_ft.config import default_config as get_config\n")
    arguments = ["data", "clean", f"--config={recipe}", f"--config.data.train={source}", "--config.seed=5"]
    assert cli.main([*arguments, f"--out={tmp_path / 'out'}"]) == 0
    config = _config(source)
    config.seed, config.task.kind = 5, "auto"
    main(config, tmp_path / "same")
    for name in ("train.jsonl", "eval.jsonl", "log.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "--out is not given" in capsys.readouterr().err


def test_written_labels_can_be_read(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(
        "prompt,response,kind\n" + "".join(f"{WORDS[n]} {WORDS[n + 1]},x,{'ab'[n % 2]}\n" for n in range(40)),
        encoding="utf-8",
    )
    first = main(_config(table, data__label="kind"), tmp_path / "out")
    again = main(_config(tmp_path / "out" / "train.jsonl", data__label="label"), tmp_path / "again")
    assert {each.label for each in first.train} == {"a", "b"}
    assert [each.label for each in first.held_out].count("a") == 2
    assert {each.label for each in again.held_out} == {"a", "b"}


def test_what_no_file_can_hold_is_written_as_it_was_read(tmp_path):
    source = tmp_path / "train.jsonl"
    line = '{{"prompt": "{} {}", "response": "x", "kind": "\\ud800"}}\n'
    source.write_text("".join(line.format(WORDS[n], WORDS[n + 1]) for n in range(30)), encoding="utf-8")
    main(_config(source, data__label="kind"), tmp_path / "out")
    lines = (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(each)["label"] for each in lines] == ["\ud800"] * 27


def test_same_config_same_files(source, tmp_path):
    for name in ("one", "two"):
        main(_config(source), tmp_path / name)
    for name in ("train.jsonl", "eval.jsonl", "log.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_spaces_and_unicode_can_be_left_as_they_are(source, tmp_path):
    cleaned = main(_config(source, clean__normalize=False), tmp_path / "out")
    assert all(texts(each)[0].endswith("\r\n") for each in cleaned.train)


@pytest.mark.parametrize("where", ["data", "data/train.jsonl"])
def test_nothing_that_is_there_is_changed(source, tmp_path, where):
    before = source.read_bytes()
    with pytest.raises(UserError, match="something already"):
        main(_config(source), tmp_path / where)
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]


def test_nothing_is_written_where_nothing_is_left(tmp_path):
    source = tmp_path / "train.jsonl"
    source.write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(UserError):
        main(_config(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_the_weights_that_are_written_balance_an_epoch(tmp_path):
    """Only training rows have a weight; the held-out file is read beside them all the same."""
    source, out = tmp_path / "source.jsonl", tmp_path / "out"
    lines = [
        json.dumps({"prompt": f"{WORDS[n]} {WORDS[n + 1]}", "response": "rare" if n % 10 == 0 else "common"})
        for n in range(100)
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    cleaned = main(_config(source, clean__balance="weights"), out)
    files = {"data__eval": str(out / "eval.jsonl"), "data__label": "label"}
    train, held_out = conversations(_config(out / "train.jsonl", data__row_weight="weight", **files))
    assert len(list(held_out)) == len(cleaned.held_out)
    sizes, counts = (Counter(each.label for each in rows) for rows in (cleaned.train, train))
    assert sizes["common"] > 5 * sizes["rare"]
    for name, size in sizes.items():
        # Half of the epoch each. Which of two whole numbers a row comes is drawn: a deviation of 1/2 at most.
        assert abs(counts[name] - len(cleaned.train) / 2) <= 4 * 0.5 * size**0.5
