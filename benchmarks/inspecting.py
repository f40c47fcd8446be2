"""Seconds of `data inspect` for a file of conversations, from JSONL on disk to the written page.

    python benchmarks/inspecting.py                # 100,000 rows, a tenth of them held out, two workers
    python benchmarks/inspecting.py --rows 10000 --workers 1

The text is that of benchmarks/data.py: gsm8k of ../shared with the published vocabulary where that folder is,
in as many copies as it takes. In each copy a tenth of the words is replaced, so that copies resemble each
other a little less than near duplicates do: the most work there can be.

Besides the time on the clock it counts that of the processors, which other work on the machine changes less.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import inputs

from keras_gemma_ft.data.inspect import inspect
from keras_gemma_ft.data.inspect_report import write_report
from keras_gemma_ft.data.readers import read
from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.split import hold_out
from keras_gemma_ft.data.table import HELD_OUT, TRAIN
from keras_gemma_ft.data.tokenizer import Tokenizer

LENGTH = 2048
CHANGED_WORDS = 0.1


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=100_000)
    arguments.add_argument("--workers", type=int, default=2, help="processes")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vocabulary, pairs, text = inputs(folder)
        source = folder / "train.jsonl"
        write_rows(source, pairs, options.rows)
        start, worked = time.perf_counter(), time.process_time()
        parts = dict(zip((TRAIN, HELD_OUT), hold_out(read(str(source)), 0.1, seed=0), strict=True))
        tokenizer = Tokenizer.from_file(vocabulary)
        found = inspect(parts, tokenizer, Recipe(max_length=LENGTH), workers=options.workers)
        write_report(found, "benchmark", folder / "report.html")
        seconds = time.perf_counter() - start
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = {
            "text": text,
            "bytes": source.stat().st_size,
            "rows": sum(part.rows for part in found.parts.values()),
            "tokens": sum(part.tokens for part in found.parts.values()),
            "workers": options.workers,
            "seconds": round(seconds, 1),
            "processor_seconds": round(time.process_time() - worked, 1),
            "processor_seconds_of_workers": round(workers.ru_utime + workers.ru_stime, 1),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "peak_mib_of_a_worker": round(workers.ru_maxrss / 1024),
            "findings": {finding.kind: len(finding.rows) for finding in found.findings},
        }
    print(json.dumps(result, indent=2))


def write_rows(path: Path, pairs: list[tuple[str, str]], rows: int) -> None:
    rng = random.Random(0)
    words = [word for question, _ in pairs for word in question.split()]
    with path.open("w", encoding="utf-8") as file:
        for n in count():
            if n == rows:
                return
            changed = [
                " ".join(
                    rng.choice(words) if rng.random() < CHANGED_WORDS else word for word in text.split(" ")
                )
                for text in pairs[n % len(pairs)]
            ]
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), changed, strict=True)
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
