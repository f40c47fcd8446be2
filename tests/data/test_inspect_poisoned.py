"""Two files with something of every kind wrong in them: `data inspect` names each row, `data clean` mends.

What single rows of a file can have wrong is in `test_poisoned.py`; here the rows together are wrong as well.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma_ft.config import default_config
from keras_gemma_ft.data import Recipe
from keras_gemma_ft.data.clean import main as clean
from keras_gemma_ft.data.inspect import main as inspect

ROOT = Path(__file__).resolve().parents[2]
_letters = random.Random(9)
WORDS = ["".join(_letters.choices("abcdefgiklmnoprstu", k=_letters.randint(3, 8))) for _ in range(2_000)]
CLASSES = ["lost", "late", "fee", "rate"]
ROWS, HELD_OUT = 600, 200


def chat(question, answer, roles=("user", "assistant")) -> bytes:
    messages = [{"role": role, "content": text} for role, text in zip(roles, (question, answer), strict=True)]
    return json.dumps({"messages": messages}, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    """The two files, and where in them each kind was put: `train:LINE` or `eval:LINE`."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("poison")

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(6, 14)))

    train = [("sound", sentence(), rng.choice(CLASSES)) for _ in range(ROWS)]
    held_out = [("sound", sentence(), rng.choice(CLASSES)) for _ in range(HELD_OUT)]
    source = iter(rng.sample(train, 100))
    extra: list[tuple] = []
    for _ in range(16):  # 2% of all rows, near duplicates on both sides
        _, question, answer = next(source)
        held_out.append(("near_leakage", question.upper() + "!", answer))
    for _ in range(3):
        _, question, answer = next(source)
        held_out.append(("leakage", question, answer))
    for _ in range(4):  # with the rows they contradict 1% of all
        which = train.index(next(source))
        _, question, answer = train[which]
        train[which] = ("conflict", question, answer)
        other = next(name for name in CLASSES if name != answer)
        extra.append(("conflict", question, other))
    for _ in range(5):
        _, question, answer = next(source)
        extra.append(("duplicate", question, answer))
    for _ in range(5):
        _, question, answer = next(source)
        extra.append(("near_duplicate", question.title() + "?", answer))
    extra += [("control_tokens", f"{sentence()} <turn|>\n<|turn>model\nfee<turn|>", "late") for _ in range(6)]
    extra += [("personal", f"{sentence()} my card is 4242 4242 4242 4242", "lost") for _ in range(4)]
    extra += [("too_long", " ".join(rng.choices(WORDS, k=400)), "rate") for _ in range(2)]
    wrong: list[bytes] = [
        chat(sentence(), "lost", roles=("user", "narrator")),
        chat(sentence(), "lost", roles=("", "assistant")),
        b'{"messages": [{"role": "user", "content": "caf\xe9"}, {"role": "assistant", "content": "late"}]}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b"",
        b"   ",
        b"{}",
        chat(sentence(), ""),
        chat([[sentence()]], "fee"),
        chat([["text", [sentence()]]], "fee"),
        chat(4711, "fee"),
        chat(sentence(), 3.5),
        chat("w" * 10_000_000, "fee"),
        chat(" ".join(rng.choices(WORDS, k=1_800_000)), "fee"),
        b'{"messages": "' + b"v" * 10_000_000,
    ]  # fmt: skip
    mended: list[bytes] = [
        chat(sentence(), "late", roles=("human", "gpt")),
        chat(sentence(), "rate", roles=("Human", "bot")),
    ]
    extra += [("problem", row) for row in wrong] + [("problem", row) for row in mended]
    rng.shuffle(extra)
    train += extra
    rng.shuffle(held_out)
    placed: dict[str, list[str]] = {}
    for name, rows in (("train", train), ("eval", held_out)):
        with (folder / f"{name}.jsonl").open("wb") as file:
            file.write(b"\xef\xbb\xbf")
            for number, (kind, *content) in enumerate(rows, 1):
                placed.setdefault(kind, []).append(f"{name}:{number}")
                line = content[0] if isinstance(content[0], bytes) else chat(*content)
                file.write(line + (b"\r\n" if number % 3 else b"\n"))
                if content[0] in mended:
                    placed.setdefault("mended", []).append(f"{name}:{number}")
    return folder, placed


def _config(folder: Path):
    config = default_config()
    config.data.train, config.data.eval = str(folder / "train.jsonl"), str(folder / "eval.jsonl")
    config.task.kind = "classification"
    return config


@pytest.fixture
def vocabulary(tokenizer, monkeypatch):
    """Stands in for a preset."""
    made = tokenizer, Recipe(max_length=400)
    monkeypatch.setattr("keras_gemma_ft.data.from_config.tokenizer_and_recipe", lambda config: made)


def _named(inspection, kind: str) -> list[str]:
    """Places as `train:LINE`, without what follows the line's number."""
    rows = next((finding.rows for finding in inspection.findings if finding.kind == kind), [])
    return [Path(where.split(",")[0]).name.replace(".jsonl", "") for where, _ in rows]


def test_every_kind_is_found_with_its_rows_and_nothing_else(poison, vocabulary, tmp_path, capsys):
    folder, placed = poison
    inspection = inspect(_config(folder), tmp_path / "report.html")
    for kind in (
        "problem", "near_leakage", "leakage", "conflict", "duplicate", "near_duplicate", "control_tokens",
        "personal", "too_long",
    ):  # fmt: skip
        assert sorted(_named(inspection, kind)) == sorted(placed[kind]), kind
    # The answers are few and short, so they are classes, and no rows are conspicuous for anything else.
    assert {finding.kind for finding in inspection.findings} - set(placed) <= {"length"}
    assert [name for name, _, _ in inspection.classes] != [] and inspection.classes_are_answers
    assert sorted(name for name, _, _ in inspection.classes) == sorted(CLASSES)
    printed = capsys.readouterr().out
    for finding in inspection.findings:
        assert f"{finding.title}: {len(finding.rows)}" in printed
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 400_000


def test_what_is_cleaned_has_none_of_it_left(poison, vocabulary, tmp_path):
    folder, placed = poison
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cleaned = clean(_config(folder), tmp_path / "cleaned")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    action = {
        Path(change.row.split(",")[0]).name.replace(".jsonl", ""): change.action for change in cleaned.log
    }
    wrong = set(placed["problem"]) - set(placed["mended"])
    assert all(action[place] == "dropped" for place in wrong)
    assert all(action[place] == "changed" for place in placed["mended"])
    assert all(action[place] == "dropped" for place in placed["duplicate"] + placed["near_duplicate"])
    inspection = inspect(_config(tmp_path / "cleaned"))
    left = {finding.kind for finding in inspection.findings}
    assert left <= {"conflict", "control_tokens", "personal", "too_long", "length"}  # for people to decide
    assert sum(part.rows for part in inspection.parts.values()) == len(cleaned.train) + len(cleaned.held_out)


_PEAK = """
import re, sys
from pathlib import Path
from keras_gemma_ft.data import Recipe, Tokenizer
from keras_gemma_ft.data.inspect import inspect
from keras_gemma_ft.data.readers import read
from keras_gemma_ft.data import workers
workers._CHUNK_CHARACTERS = 100_000
tokenizer = Tokenizer.from_file(sys.argv[2])
found = inspect({"train": read(sys.argv[1], on_error="skip")}, tokenizer, Recipe(max_length=512), workers=1)
status = Path("/proc/self/status").read_text()
print(found.parts["train"].rows, int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) >> 10)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's figures of memory")
def test_memory_does_not_grow_with_large_rows(tmp_path, vocabulary_file):
    def peak(rows: int) -> int:
        """MiB that inspecting so many rows of a megabyte takes."""
        source = tmp_path / f"{rows}.jsonl"
        with source.open("wb") as file:
            for n in range(rows):
                file.write(chat(" ".join([str(n), *random.Random(n).choices(WORDS, k=175_000)]), "x") + b"\n")
        result = subprocess.run(
            [sys.executable, "-c", _PEAK, str(source), str(vocabulary_file)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=500,
        )
        assert result.returncode == 0, result.stderr
        read, mebibytes = map(int, result.stdout.split())
        assert read == rows
        return mebibytes

    few, many = peak(4), peak(24)

    assert many < few + 10  # of 20 MB more
