#!/usr/bin/env bash
# Writes run.lock (what the product needs) and test.lock (that, and what its tests need) from pyproject.toml.
# One file serves every supported Python, by environment markers. Needs uv: https://docs.astral.sh/uv
set -euo pipefail
cd "$(dirname "$0")/.."

resolve() {
    uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate pyproject.toml "$@"
}

{
    echo "# Written by requirements/make_lock.sh: change pyproject.toml and run that."
    resolve
} > requirements/run.lock.new
mv requirements/run.lock.new requirements/run.lock

# torch is a range, so that pip may take a CPU build where one is at hand; what only its CUDA build needs is
# left to that build.
{
    echo "# Written by requirements/make_lock.sh: change pyproject.toml and run that."
    resolve --extra test --constraint requirements/run.lock | grep -Ev '^(torch|triton|cuda-|nvidia-)'
    echo "# A range, so that pip takes a CPU build where it finds one."
    echo "torch>=2.9,<2.14"
} > requirements/test.lock.new
mv requirements/test.lock.new requirements/test.lock
