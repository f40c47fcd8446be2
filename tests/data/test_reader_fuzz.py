"""Fuzzed files: whatever they hold, each row becomes a conversation or a problem, or the file is refused."""

import json

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keras_gemma_ft.data.formats import READERS
from keras_gemma_ft.data.readers import read
from keras_gemma_ft.data.row_layouts import LAYOUTS
from keras_gemma_ft.data.rows import Conversation, Problem
from keras_gemma_ft.errors import UserError

NAMES = ["messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output"]
NAMES += [
    "system",
    "tools",
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "function",
    "name",
    "arguments",
]
NAMES += ["reasoning", "start", "end", "label", "valueSpan", "text", "a.b"]
TEXTS = [
    "",
    " ",
    "Hi",
    "user",
    "assistant",
    "tool",
    "gpt",
    "human",
    "function_call",
    '[{"role": "user"}]',
    "{}",
]
TEXTS += ["\ud83d", "\x00", "a,b\n", '"', "\u2028", "<|turn>", "é"]
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS) | st.text(max_size=5)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=15,
)
rows = st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=4)
settled = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def check(path, **options):
    try:
        for row in read(str(path), on_error="skip", **options):
            assert isinstance(row, (Conversation, Problem))
            if isinstance(row, Problem):
                assert row.what and row.where.startswith(str(path))
    except UserError as error:
        assert error.where and error.remedy


@settled
@given(st.lists(rows, max_size=4), st.sampled_from(["auto", *LAYOUTS]))
@example([{"messages": [{"from": None}]}], "auto")
@example([{"prompt": ["a"], "response": ["b"]}], "auto")
@example([{"prompt": "text", "response": [[0, 9, "label"]]}], "spans")
def test_any_values(tmp_path, records, layout):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    check(path, layout=layout)
    check(path, layout=layout, template="{prompt:x}{text.content}", label="label")
    path.write_text(json.dumps(records))
    check(path, layout=layout, format="json")


SEEDS = [
    b'{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n',
    b'[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]',
    b'prompt,response\r\n"a ""x""",b\r\nc,d\r\n',
    b"\xef\xbb\xbfprompt\tresponse\na\tb\n",
]


@settled
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 8), st.binary(max_size=4)), max_size=5),
    st.sampled_from(["auto", *READERS]),
)
def test_any_bytes(tmp_path, content, edits, format):
    for at, removed, inserted in edits:
        content = content[:at] + inserted + content[at + removed :]
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    check(path, format=format)
    path = tmp_path / "train.json"
    path.write_bytes(content)
    check(path)
