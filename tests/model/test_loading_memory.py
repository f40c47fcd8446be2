"""What loading takes of the host beside the model itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import KINDS, write_hf

ROOT = Path(__file__).resolve().parents[2]
# Some 390 MB in float32, of which the stacks of the feed-forward layers are 75 MB each.
WIDE = {
    **KINDS["31b"],
    "hidden_size": 768,
    "intermediate_size": 3072 * 2,
    "vocab_size": 16_384,
}
LOADING = """
import sys, threading, time
import jax.numpy as jnp
from keras_gemma_ft.model import reading
from keras_gemma_ft.model.loading import HFSource, load

reading.AHEAD = 16 * 2**20

def anonymous():  # what is mapped from files can be dropped at any time
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])

def watch():
    while running:
        seen.append(anonymous())
        time.sleep(0.001)

small = HFSource(sys.argv[2])
dict(load(small, small.dtype))  # what the library takes for itself
source = HFSource(sys.argv[1])
running, seen = True, []
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
weights = dict(load(source, source.dtype))
for value in weights.values():
    value.block_until_ready()
running = False
thread.join()
sizes = [value.nbytes for value in weights.values()]
print(sum(sizes), max(sizes), max(seen) - before)
"""


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_than_the_model(tmp_path):
    write_hf(tmp_path / "wide", WIDE)
    write_hf(tmp_path / "small", KINDS["31b"])
    shards = [path.stat().st_size for path in (tmp_path / "wide").glob("*.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path / "wide"), str(tmp_path / "small")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    model, stack, taken = map(int, done.stdout.split())
    print(json.dumps({"model": model, "stack": stack, "taken": taken, "shard": max(shards)}))
    assert model > 3e8
    # No whole file is read: the largest stack, and not the only shard, is what may lie beside the model.
    assert taken < model + 1.3 * stack
