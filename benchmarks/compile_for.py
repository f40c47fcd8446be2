"""A training step compiled for a GPU that is not here: what memory it takes there, and its program.

    pip install "jax[cuda13]"    # XLA's compiler for GPUs; none is needed to compile
    python benchmarks/compile_for.py --target=h200.txtpb --model=31b --method=qlora --rows=1
    python benchmarks/compile_for.py --target=h200.txtpb --model=e4b --program=e4b.hlo

The target is a GPU's description as XLA has them: xla/backends/gpu/target_config/specs of
github.com/openxla/xla. The other arguments are those of step.py. No weight is ever made: arrays of their
shapes lie in memory that is never touched. Prints one JSON object:

    step_gib            of the device, by the compiler's own count, without what lies on the host
    state_gib, host_gib what of the step's state lies on the device, and on the host
    trace_s, compile_s  on this machine

Without a GPU the compiler tries no algorithms out: its products may be others than there. What JAX and the
CUDA libraries take for themselves comes on top, 0.1 to 0.4 GiB in the cases measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import step

from keras_gemma_ft import compilation
from keras_gemma_ft.errors import UserError

GIB = 2**30


def described_gpu(description: str, path: str) -> Any:
    """The device that a target's description is of.

    Raises:
        UserError: This JAX cannot compile for NVIDIA GPUs, or the description is none.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=description
        ).devices[0]
    except Exception as error:
        raise UserError(
            f"JAX makes no device of it: {str(error).splitlines()[0]}",
            where=f"--target={path}",
            remedy='install JAX with its compiler for GPUs, pip install "jax[cuda13]", and give a file of '
            "xla/backends/gpu/target_config/specs.",
        ) from error


def weightless(case: argparse.Namespace) -> tuple[Any, set[int]]:
    """A case's model, of arrays without memory behind them; and the ids of those that belong on a host."""
    import jax

    from keras_gemma_ft.model import loading, reading
    from keras_gemma_ft.model.weights import table

    hosted: set[int] = set()

    def untouched(shape: Any) -> jax.Array:
        return jax.device_put(reading.aligned(shape.shape, shape.dtype))

    def load(source: Any, dtype: str, quantization: Any = None) -> Iterator[tuple[str, Any]]:
        source = loading.RandomSource(source.config)  # its values can be left uncomputed, a file's not unread
        for name, weight in table(source.config).items():
            kind = loading.kind_of(weight, quantization)

            def make(weight: Any = weight, kind: Any = None if kind == "host" else kind) -> Any:
                return loading._load_one(weight, loading._arrays(source, weight, whole=False), dtype, kind)

            value = jax.tree.map(untouched, jax.eval_shape(make))
            if kind == "host":
                hosted.add(id(value))
            yield name, value

    with mock.patch.object(loading, "load", load):
        model = step._model(case)
    model.optimizer.build(model.trainable_variables)
    return model, hosted


def measure(case: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Compiles the step of a case for a device."""
    import jax

    from keras_gemma_ft.ops import host, nvidia

    model, hosted = weightless(case)
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, [])
    values = tuple([variable.value for variable in group] for group in groups)
    host_bytes = sum(value.nbytes for group in values for value in group if id(value) in hosted)
    host_shapes = {value.shape for group in values for value in group if id(value) in hosted}
    there = jax.sharding.SingleDeviceSharding(device)
    state, batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=there),
        (values, step.packed_batch(model.config, case.rows, case.length)),
    )
    abstract = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="cuda")
    with ExitStack() as pretended:
        for owner, name, answer in (
            (jax, "default_backend", lambda: "gpu"),
            (nvidia, "compute_capability", lambda: float(device.compute_capability)),
            (host, "holds", lambda table: table.shape in host_shapes),
        ):
            pretended.enter_context(mock.patch.object(owner, name, answer))
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
        pretended.enter_context(jax.sharding.use_abstract_mesh(mesh))
        began = time.perf_counter()
        lowered = jax.jit(model.train_step, donate_argnums=0).lower(state, batch)
        traced = time.perf_counter()
        program = lowered.compile()
    compiled = time.perf_counter()
    if case.program:
        Path(case.program).write_text(program.as_text(), encoding="utf-8")
    size = program.memory_analysis()
    taken = (
        size.argument_size_in_bytes + size.temp_size_in_bytes + size.output_size_in_bytes
        - size.alias_size_in_bytes - host_bytes
    )  # fmt: skip
    return {
        **step.described(case),
        "step_gib": round(taken / GIB, 2),
        "state_gib": round((sum(a.nbytes for group in values for a in group) - host_bytes) / GIB, 2),
        "host_gib": round(host_bytes / GIB, 2),
        "trace_s": round(traced - began, 1),
        "compile_s": round(compiled - traced, 1),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="a file: XLA's description of a GPU")
    given, rest = parser.parse_known_args()
    case = step.arguments(rest)
    os.environ["JAX_PLATFORMS"] = "cpu"
    compilation.prepare()
    try:
        try:
            description = Path(given.target).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot be read: {getattr(error, 'strerror', None) or error}",
                where=f"--target={given.target}",
                remedy="give a file of XLA's xla/backends/gpu/target_config/specs.",
            ) from error
        print(json.dumps(measure(case, described_gpu(description, given.target))), flush=True)
    except (UserError, OSError) as error:
        print(f"compile_for.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
