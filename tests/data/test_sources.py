"""Where rows come from: file formats, buckets, TensorFlow and Hugging Face datasets, and how they mix."""

import gzip
import json
import sys
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from keras_gemma_ft.config import default_config
from keras_gemma_ft.data.files import NotHereError
from keras_gemma_ft.data.readers import conversations, fingerprints, read
from keras_gemma_ft.data.rows import Problem
from keras_gemma_ft.errors import UserError

ROWS = [{"prompt": f"What is {n}?", "response": f"Ünï {n}"} for n in range(3)]
CALL = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(delimiter):
    cells = [("prompt", "response"), *((row["prompt"], row["response"]) for row in ROWS)]
    return "".join(f"{a}{delimiter}{b}\r\n" for a, b in cells).encode()


def parquet(rows=ROWS):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def answers(rows):
    return [row.messages[-1]["content"] for row in rows]


FILES = {
    "jsonl": ("a.jsonl", lines(), "JSON lines", "a.jsonl:2"),
    "lines in .json": ("a.json", lines(), "JSON lines", "a.json:2"),
    "an array": ("a.json", json.dumps(ROWS).encode(), "a JSON array", "a.json:1 (row 2)"),
    "an indented array": ("a.json", json.dumps(ROWS, indent=1).encode(), "a JSON array", "a.json:6 (row 2)"),
    "an array in .jsonl": (
        "a.jsonl",
        b"[\n" + json.dumps(ROWS)[1:].encode(),
        "a JSON array",
        "a.jsonl:2 (row 2)",
    ),
    "no name to tell": ("rows", lines(), "JSON lines", "rows:2"),
    "csv": ("a.csv", delimited(","), "CSV", "a.csv:3"),
    "semicolons": ("a.csv", delimited(";"), "CSV", "a.csv:3"),
    "tsv": ("a.tsv", delimited("\t"), "TSV", "a.tsv:3"),
    "parquet": ("a.parquet", parquet(), "Parquet", "a.parquet, row 2"),
    "parquet by its bytes": ("a", parquet(), "Parquet", "a, row 2"),
    "gzip": ("a.csv.gz", gzip.compress(delimited(",")), "CSV", "a.csv.gz:3"),
    "gzip by its bytes": ("a.jsonl", gzip.compress(lines()), "JSON lines", "a.jsonl:2"),
    "a byte order mark": (
        "a.json",
        b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
        "a JSON array",
        "a.json:1 (row 2)",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_the_format_is_told(folder, case):
    name, content, format, second = FILES[case]
    (folder / name).write_bytes(content)
    told = []
    rows = list(read(name, tell=told.append))
    assert told == [f"{name}: {format}, 'prompt' answered by 'response'"]
    assert [row.messages[0]["content"] for row in rows] == [row["prompt"] for row in ROWS]
    assert answers(rows) == [row["response"] for row in ROWS]
    assert rows[1].origin == second


def test_a_wrong_guess_is_overridden(folder):
    (folder / "a.txt").write_bytes(delimited("\t"))
    with pytest.raises(UserError, match="neither its name nor its beginning") as caught:
        list(read("a.txt"))
    assert "data.format" in caught.value.remedy
    assert answers(read("a.txt", format="tsv")) == [row["response"] for row in ROWS]
    both = {"messages": [{"role": "model", "content": "m"}], "instruction": "i", "output": "o"}
    (folder / "a.jsonl").write_bytes(lines([both]))
    assert answers(read("a.jsonl")) == ["m"]
    assert answers(read("a.jsonl", layout="alpaca")) == ["o"]
    with pytest.raises(UserError, match="layout alpaca has its own questions"):
        list(read("a.jsonl", layout="alpaca", template="{instruction}"))


ARRAYS = {
    "broken off": (b'[{"prompt": "a", "response": "b"},\n', "a.json:2: the array is no JSON"),
    "no comma": (b'[{"prompt": "a", "response": "b"}\n{}]', "a.json:2: the array has no comma"),
    "malformed": (b'[\n{"prompt": a}]', "a.json:2: the array is no JSON"),
    "too deep": (b"[" * 100_000, "a.json:1: the array is nested too deeply"),
    "endless": (b'["' + b"x" * (40 << 20), "a.json:1: the array is no JSON: Unterminated string"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_breaks_off_is_an_error_in_any_case(folder, case):
    content, says = ARRAYS[case]
    (folder / "a.json").write_bytes(content)
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError) as caught:
            list(read("a.json", on_error=on_error))
        assert str(caught.value).startswith(says)


def test_a_wrong_row_of_an_array_is_named(folder):
    bad = [b"{}", b"[1]", b'{"prompt": "\xff", "response": "a"}', b'{"prompt": "' + b"x" * 10_000_000 + b'"}']
    good = json.dumps(ROWS[0]).encode()
    (folder / "a.json").write_bytes(b"[" + b",\n".join([good, *bad, good]) + b"]")
    first, *problems, last = read("a.json", on_error="skip")
    assert (first.origin, last.origin) == ("a.json:1 (row 1)", "a.json:6 (row 6)")
    assert [(problem.where, problem.what) for problem in problems] == [
        ("a.json:2 (row 2)", "the object is empty"),
        ("a.json:3 (row 3)", "the row is a list, not an object"),
        ("a.json:4 (row 4)", "the text is not UTF-8"),
        ("a.json:5 (row 5)", "the row is longer than 8 MiB"),
    ]


def test_parquet_keeps_what_messages_hold_and_nothing_more(folder):
    chat = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Look.", "tool_calls": [CALL], "reasoning": "why"},
        {"role": "tool", "content": "snow", "tool_call_id": "1"},
        {"role": "assistant", "content": "Snow."},
    ]
    (folder / "a.parquet").write_bytes(parquet([{"messages": chat}, {"messages": chat[:1] + chat[3:]}]))
    first, second = read("a.parquet")
    assert first.messages == chat
    assert second.messages == chat[:1] + chat[3:]


def test_a_wrong_row_of_parquet_is_named(folder):
    table = pyarrow.table(
        {
            "prompt": pyarrow.Array.from_buffers(
                pyarrow.string(), 4, pyarrow.array([b"a", b"\xff", b"a", b"a"]).buffers()
            ),
            "response": ["b", "b", None, "b"],
        }
    )
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    first, broken, null, last = read("a.parquet", on_error="skip")
    assert (first.origin, last.origin) == ("a.parquet, row 1", "a.parquet, row 4")
    assert (broken.where, broken.what) == ("a.parquet, row 2", "the text is not UTF-8")
    assert (null.where, null.what) == ("a.parquet, row 3, column 'response'", "is null, not text")
    (folder / "b.parquet").write_bytes(parquet()[:-20])
    with pytest.raises(UserError, match=r"b\.parquet: the file is no Parquet, or damaged"):
        list(read("b.parquet"))


def test_damaged_files_are_named(folder):
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines(ROWS * 1000))[:-100])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: the compressed file is damaged"):
        list(read("cut.jsonl.gz"))
    (folder / "utf16.csv").write_bytes(delimited(",").decode().encode("utf-16"))
    with pytest.raises(UserError, match=r"utf16\.csv: the text is UTF-16"):
        list(read("utf16.csv"))
    (folder / "rows").mkdir()
    with pytest.raises(UserError, match=r"rows: is a directory") as caught:
        list(read("rows"))
    assert "hf:rows" in caught.value.remedy


def test_names_and_patterns(folder):
    for path in ("2024/b.jsonl", "2024/a.jsonl", "2025/a.jsonl", "2025/c.csv"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(lines([{"prompt": "p", "response": path}]))
    assert answers(read("2024/*.jsonl, 2025/a.jsonl")) == ["2024/a.jsonl", "2024/b.jsonl", "2025/a.jsonl"]
    assert answers(read("202[45]/a.jsonl")) == ["2024/a.jsonl", "2025/a.jsonl"]
    assert answers(read(f"{folder}/*/b.jsonl")) == ["2024/b.jsonl"]
    with pytest.raises(UserError, match=r"2024/\*\.csv: no file fits the pattern"):
        list(read("2024/*.csv"))
    with pytest.raises(UserError, match=r"\*\*/a\.jsonl: a pattern may not hold \*\*"):
        list(read("**/a.jsonl"))


class GFile:
    """A file of TensorFlow's file systems, as far as epath uses one: it can read and seek."""

    def __init__(self, path):
        self._file = path.open("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, n=-1):
        return self._file.read(n)

    def seek(self, offset, whence=0):
        self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()


@pytest.fixture
def bucket(folder, monkeypatch):
    """A bucket whose files lie in the folder."""

    def here(path):
        return folder / str(path).removeprefix("gs://bucket/")

    def opened(original, path, mode):
        assert str(path).startswith("gs://bucket/")
        return GFile(here(path))

    def found(original, pattern):
        return [f"gs://bucket/{path.name}" for path in folder.glob(str(pattern).removeprefix("gs://bucket/"))]

    # Without TensorFlow epath asks its table of file systems, which can be exchanged.
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    with epath.testing.mock_epath(open=opened, glob=found):
        yield


def test_buckets(folder, bucket):
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[1:])))
    (folder / "a.parquet").write_bytes(parquet(ROWS[:1]))
    assert answers(read("gs://bucket/*")) == [row["response"] for row in ROWS]
    assert next(iter(read("gs://bucket/b.jsonl.gz"))).origin == "gs://bucket/b.jsonl.gz:1"
    with pytest.raises(UserError, match=r"gs://bucket/none\.jsonl: there is no such file"):
        list(read("gs://bucket/none.jsonl"))


def test_what_a_bucket_answers_is_told(folder, bucket, monkeypatch):
    def fail(self, n=-1):
        raise RuntimeError("403: not yours\nmore")

    (folder / "a.jsonl").write_bytes(lines())
    monkeypatch.setattr(GFile, "read", fail)
    with pytest.raises(UserError, match=r"gs://bucket/a\.jsonl: cannot be read \(403: not yours\)"):
        list(read("gs://bucket/a.jsonl"))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TensorFlow dataset of 20 rows in two configurations, written by the library itself."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features

    class Greetings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [  # noqa: RUF012 (the library's own way)
            tfds.core.BuilderConfig(name=name, description="for a test") for name in ("plain", "chat")
        ]

        def _info(self):
            message = {"role": features.Text(), "content": features.Text()}
            plain = {
                "text": features.Text(),
                "class": features.ClassLabel(names=["even", "odd"]),
                "n": np.int64,
            }
            chat = {"messages": features.Sequence(message), "tags": features.Sequence(features.Text())}
            columns = chat if self.builder_config.name == "chat" else plain
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(columns))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(2)}

        def _generate_examples(self, count=0):
            for n in range(count):
                chat = [{"role": "user", "content": f"é{n}"}, {"role": "assistant", "content": f"a{n}"}]
                if self.builder_config.name == "chat":
                    yield n, {"messages": chat, "tags": ["x", "y"]}
                else:
                    yield n, {"text": f"é{n}", "class": n % 2, "n": n}

    folder = tmp_path_factory.mktemp("tfds")
    with tfds.testing.disable_gcs_access():
        for name in ("plain", "chat"):
            Greetings(data_dir=folder, config=name).download_and_prepare()
    return str(folder)


def test_tensorflow_datasets(tfds_dir):
    columns = {"prompt": "text", "response": "class", "data_dir": tfds_dir}
    told = []
    rows = list(read("tfds:greetings/plain:1.0.0", **columns, tell=told.append))
    assert told == ["tfds:greetings/plain:1.0.0: TensorFlow dataset, 'text' answered by 'class'"]
    assert sorted(row.messages[0]["content"] for row in rows) == sorted(f"é{n}" for n in range(20))
    assert all(
        row.messages[1]["content"] == ("even", "odd")[int(row.messages[0]["content"][1:]) % 2] for row in rows
    )
    assert rows[4].origin == "tfds:greetings/plain:1.0.0, row 5"
    assert [row.messages for row in read("tfds:greetings/plain:1.0.0", **columns)] == [
        row.messages for row in rows
    ]
    assert len(list(read("tfds:greetings/plain#test", **columns))) == 2
    assert len(list(read("tfds:greetings/plain#train[:25%]", **columns))) == 5
    (wrong, *_) = read("tfds:greetings/plain#test", **{**columns, "response": "n"}, on_error="skip")
    assert isinstance(wrong, Problem)
    assert (wrong.where, wrong.what[:10]) == ("tfds:greetings/plain#test, row 1, column 'n'", "is a numbe")


def test_conversations_of_tensorflow_datasets(tfds_dir):
    rows = list(read("tfds:greetings/chat#test", data_dir=tfds_dir))
    assert sorted(answers(rows)) == ["a0", "a1"]
    for row in rows:
        number = row.messages[1]["content"][1:]
        assert row.messages == [
            {"role": "user", "content": f"é{number}"},
            {"role": "assistant", "content": f"a{number}"},
        ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tfds:greetings/none:1.0.0", "none"),
        ("tfds:greetings/plain:7.0.0", "7.0.0"),
        ("tfds:nothing_of_that_name", "nothing_of_that_name"),
        ("tfds:greetings/plain#dev", "dev"),
    ],
)
def test_what_tensorflow_datasets_lack_is_named(tfds_dir, name, says):
    with pytest.raises(UserError) as caught:
        list(read(name, data_dir=tfds_dir))
    assert caught.value.where == name
    assert says in caught.value.what
    assert "data.data_dir" in caught.value.remedy
    assert len(str(caught.value).splitlines()) == 2


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("datasets")


def test_hugging_face_datasets(folder, hub):
    features = hub.Features({"text": hub.Value("string"), "class": hub.ClassLabel(names=["even", "odd"])})
    table = hub.Dataset.from_dict({"text": ["a", "b", "c"], "class": [0, 1, -1]}, features=features)
    hub.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "both")
    table.save_to_disk(folder / "one")
    columns = {"prompt": "text", "response": "class", "on_error": "skip"}
    for name in ("hf:both", "hf:one", f"hf:{folder}/both#train"):
        first, second, third = read(name, **columns)
        assert answers([first, second]) == ["even", "odd"]
        assert first.origin == f"{name}, row 1"
        assert (third.what, third.where) == ("is empty", f"{name}, row 3, column 'class'")
    assert answers(read("hf:both#test", **columns)) == ["odd"]
    with pytest.raises(UserError, match=r"hf:both#dev: .* there are: train, test"):
        list(read("hf:both#dev", **columns))


def test_directories_of_files_for_hugging_face(folder, hub, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_bytes(lines())
    (folder / "rows" / "test.jsonl").write_bytes(lines(ROWS[:1]))
    assert answers(read("hf:rows")) == [row["response"] for row in ROWS]
    assert len(list(read("hf:rows#test"))) == 1


def test_what_the_hub_lacks_is_named(hub):
    with pytest.raises(UserError, match="the dataset cannot be read") as caught:
        list(read("hf:no_such_org/no_such_dataset:main#test"))
    assert caught.value.where == "hf:no_such_org/no_such_dataset:main#test"
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "module", "says"),
    [
        ("tfds:greetings", "tensorflow_datasets", "tensorflow-datasets"),
        ("hf:a/b", "datasets", "keras-gemma-ft[data]"),
    ],
)
def test_a_library_that_is_missing_is_named(monkeypatch, name, module, says):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotHereError) as caught:
        list(read(name))
    assert caught.value.where == name
    assert "pip install" in caught.value.remedy
    assert says in caught.value.remedy


@pytest.fixture
def config(folder):
    for name, count in (("a", 30), ("b", 60)):
        rows = [{"prompt": f"{name}{n}", "response": name} for n in range(count)]
        (folder / f"{name}.jsonl").write_bytes(lines(rows))
    made = default_config()
    made.data.train = "a.jsonl,b.jsonl"
    made.data.eval_fraction = 0.1
    return made


def test_files_mix_by_weight(config):
    config.data.weights = "2.5,0.5"
    train, held_out = conversations(config)
    counts = Counter(answers(train))
    # Held out is a tenth of each; of the others come two or three copies of each a, and about half of the b.
    assert Counter(answers(held_out)) == {"a": 3, "b": 6}
    assert counts["a"] in range(27 * 2 + 5, 27 * 3 - 4)
    assert counts["b"] in range(17, 38)
    asked = [row.messages[0]["content"] for row in train]
    assert [row.messages[0]["content"] for row in train] == asked
    assert not set(asked) & {row.messages[0]["content"] for row in held_out}
    assert set(Counter(question for question in asked if question[0] == "a").values()) == {2, 3}


def test_rows_follow_their_own_weights(config, folder):
    rows = [
        {"prompt": f"{name}{n}", "response": name, "weight": weight}
        for name, weight in (("a", 2.5), ("b", "0.5"), ("c", 0))
        for n in range(40)
    ]
    (folder / "a.jsonl").write_bytes(lines(rows))
    config.data.row_weight = "weight"
    config.data.train, config.data.eval_fraction = "a.jsonl", 0.25
    train, held_out = conversations(config)
    assert Counter(answers(held_out)) == {"a": 10, "b": 10, "c": 10}
    counts = Counter(answers(train))
    assert counts["a"] in range(30 * 2 + 5, 30 * 3 - 4)
    assert counts["b"] in range(5, 26)
    assert counts["c"] == 0
    config.data.weights = "2"
    assert Counter(answers(conversations(config)[0]))["a"] == 30 * 5


@pytest.mark.parametrize("weight", [-1, "much", True, None])
def test_a_row_weight_that_is_none(config, folder, weight):
    (folder / "a.jsonl").write_bytes(lines([{"prompt": "Hi", "response": "Hello", "weight": weight}] * 9))
    config.data.train, config.data.row_weight = "a.jsonl", "weight"
    with pytest.raises(UserError, match="not a number from 0 on") as caught:
        list(conversations(config)[0])
    assert "a.jsonl:1" in caught.value.where
    assert "'weight'" in caught.value.where


@pytest.mark.parametrize(
    ("weights", "says"), [("2", "1 weights for 2"), ("2,x", "numbers"), ("1,0", "numbers")]
)
def test_weights_that_fit_nothing(config, weights, says):
    config.data.weights = weights
    with pytest.raises(UserError, match=says) as caught:
        conversations(config)
    assert caught.value.where == "data.weights"


def test_held_out_rows_of_their_own(config):
    config.data.train, config.data.eval = "a.jsonl", "b.jsonl"
    train, held_out = conversations(config)
    assert (len(answers(train)), len(answers(held_out))) == (30, 60)
    config.data.eval = "b.jsonl,./a.jsonl"
    with pytest.raises(UserError, match=r"data\.eval: the rows of \./a\.jsonl are training data, too"):
        fingerprints(config)


def test_answers_are_labels_of_a_classification(config):
    assert {row.label for row in conversations(config)[0]} == {None}
    config.task.kind = "classification"
    assert {row.label for row in conversations(config)[0]} == {"a", "b"}
    config.data.label = "prompt"
    assert {"a0", "b0"} < {row.label for part in conversations(config) for row in part}


def test_fingerprints(folder, config, tfds_dir, hub):
    before = fingerprints(config)
    assert list(before) == ["a.jsonl", "b.jsonl", "read as"]
    assert fingerprints(config) == before
    config.data.prompt = "question"
    assert fingerprints(config)["read as"] != before["read as"]
    (folder / "b.jsonl").write_bytes(lines())
    after = fingerprints(config)
    assert (after["a.jsonl"] == before["a.jsonl"], after["b.jsonl"] == before["b.jsonl"]) == (True, False)
    hub.Dataset.from_list(ROWS).save_to_disk(folder / "one")
    config.data.data_dir = tfds_dir
    names = ["*.jsonl", "hf:one", "tfds:greetings/plain", "tfds:greetings/plain#test", "tfds:greetings/chat"]
    config.data.train = ",".join(names)
    many = fingerprints(config)
    assert [*many] == [*names, "read as"]
    assert len(set(many.values())) == 6
    assert fingerprints(config) == many


def test_what_is_not_here_may_be_known(folder, config):
    known = fingerprints(config)
    (folder / "b.jsonl").unlink()
    with pytest.raises(NotHereError, match=r"b\.jsonl: there is no such file"):
        fingerprints(config, {"a.jsonl": "x"})
    told = []
    assert fingerprints(config, known, told.append) == known
    assert told == ["b.jsonl: there is no such file; the rows that were prepared from it are used"]
