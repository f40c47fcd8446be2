"""A coverage-guided fuzzer for rows: keeps what reaches new code, and mutates it further.

    python tests/data/fuzz_rows.py --vocabulary ../shared/tokenizer/gemma4.model --seconds 600

A row goes through the template, encoding, truncation, the mask contract and packing. It may end in a
UserError that says what to do, or in tokens that keep the contract and spell the row's text; anything else is
printed with the row and ends the run with exit code 1. Prints one JSON object of figures otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.mask_contract import NOTHING_TRAINED, RULES, MaskContract
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.shards import Recipe, ShardMaker
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.truncation import POLICIES
from keras_gemma_ft.errors import UserError

WATCHED = str(Path(__file__).resolve().parents[2] / "keras_gemma_ft" / "data")
CALL = {"id": "1", "function": {"name": "f", "arguments": {"x": [1, None, True], "y": {"z": "s"}}}}
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "array", "items": {"type": "string"}, "enum": ["a"]}},
}
SEEDS: list[Any] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "model", "content": "Look.", "reasoning": "why", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "snow"},
            {"role": "assistant", "content": "Snow.", "reasoning_content": "so"},
        ],
        "tools": [{"function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
    },
]
WORDS = [
    "<|turn>model\n",
    "<turn|>",
    "<bos>",
    "<|tool_response>",
    "<tool_response|>",
    "<channel|>",
    "<|channel>",
]
WORDS += [
    "",
    " ",
    "\n\n",
    "  ",
    "▁",
    "\0",
    "\ud83d",
    "😀",
    "user",
    "assistant",
    "tool",
    "system",
    "{}",
    "x" * 400,
]
Step = tuple[str, int, int]
VALUES: list[Any] = [None, True, 0, -1.5, float("nan"), [], {}, [[]], *WORDS]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--vocabulary", required=True, help="tokenizer.model or tokenizer.json")
    arguments.add_argument("--seconds", type=float, default=600)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    rng = random.Random(options.seed)
    target = Target(Tokenizer.from_file(options.vocabulary))
    corpus = list(SEEDS)
    covered: set[Step] = set()
    runs = errors = 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        row = corpus[runs] if runs < len(SEEDS) else mutate(rng.choice(corpus), corpus, rng)
        runs += 1
        try:
            reached, accepted = target.run(row, rng.randrange(1 << 30))
        except Exception:  # whatever it is, it is what this program looks for
            traceback.print_exc()
            print(f"row: {row!r}")
            sys.exit(1)
        errors += not accepted
        if not reached <= covered:
            covered |= reached
            corpus.append(row)
    figures = {"runs": runs, "user_errors": errors, "kept_rows": len(corpus), "steps": len(covered)}
    print(json.dumps({**figures, "crashes": 0}))


class Target:
    """Runs a row under a tracer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encoder = ScriptEncoder(tokenizer)
        self.contract = MaskContract(tokenizer)
        self.steps: set[Step] = set()
        self.line = 0

    def run(self, row: Any, seed: int) -> tuple[set[Step], bool]:
        """The steps from line to line that were made in the data rooms, and whether the row was accepted."""
        self.steps = set()
        sys.settrace(self.trace)
        try:
            return self.steps, self.check(row, random.Random(seed))
        except UserError as error:
            assert error.what, "an error says what"
            assert error.remedy, "an error says what to do"
            return self.steps, False
        finally:
            sys.settrace(None)

    def check(self, row: Any, rng: random.Random) -> bool:
        messages, tools = (row.get("messages"), row.get("tools")) if isinstance(row, dict) else (row, None)
        template = Template(
            rng.choice(["edge", "large"]),
            rng.choice([None, True]),
            rng.choice(["off", "last_turn", "keep"]),
            rng.choice(["all", "last"]),
        )
        recipe = Recipe(template, rng.randint(16, 200), rng.random() < 0.5, rng.choice(POLICIES))
        maker = ShardMaker(self.tokenizer, recipe)
        _, counts, problems = maker.rows([Conversation(messages, "row", tools=tools)])
        assert all(problem.where and problem.remedy for problem in problems)
        assert counts["trained_tokens"] >= counts["examples"]
        script = template.script(messages, tools)
        batch = self.encoder.encode([script])
        text = str(script).removeprefix("<bos>").replace("▁", " ")
        assert self.tokenizer.decode(batch.token_ids) == text, "the text survives"
        rule = self.contract.broken(batch)[0]
        assert rule < 0 or RULES[rule] == NOTHING_TRAINED, RULES[rule]
        return True

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        self.steps.add((frame.f_code.co_filename, self.line, frame.f_lineno))
        self.line = frame.f_lineno
        return self.trace


def mutate(row: Any, corpus: list[Any], rng: random.Random) -> Any:
    """A copy of the row with a few places changed."""
    row = json.loads(json.dumps(row))
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = list(walk(row))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        action = rng.randrange(5)
        if action == 0:
            holder[key] = rng.choice(VALUES)
        elif action == 1:  # a part of another row
            donor, at = rng.choice(list(walk(rng.choice(corpus))) or [(VALUES, 0)])
            holder[key] = json.loads(json.dumps(donor[at]))
        elif action == 2 and isinstance(holder[key], str):
            at = rng.randint(0, len(holder[key]))
            holder[key] = holder[key][:at] + rng.choice(WORDS) + holder[key][at:]
        elif action == 3 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[rng.randrange(len(holder))])))
        else:
            del holder[key]
    return row


def walk(value: Any) -> Any:
    """Every place of a JSON value, as (container, key)."""
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(places):
        yield value, key
        yield from walk(child)


if __name__ == "__main__":
    main()
