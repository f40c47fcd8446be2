"""`train.remat=auto`: the fastest way to rematerialize whose compiled training step fits the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.model.gemma4 import Remat

# From what computes least again to what keeps least on the device; docs/performance.md has their speeds.
LADDER: tuple[Remat, ...] = (
    "none",
    "matmuls",
    "feed_forward",
    "outputs",
    "sublayers",
    "down",
    "attention",
    "full",
    "offload",
)
# The rest is for what lies beside the step: the next batch, and gaps between the allocator's blocks.
SHARE = 0.95


@dataclass(frozen=True)
class Choice:
    """What was taken, and why.

    Attributes:
        remat: The policy.
        needs: Bytes on the device of each policy's compiled step, in the order in which they were compiled;
            None where it does not compile.
        limit: Bytes that a program may take of the device; None: the device does not say.
    """

    remat: Remat
    needs: Mapping[Remat, int | None]
    limit: int | None

    def __str__(self) -> str:
        if self.limit is None:
            return f"remat: {self.remat}; the device reports no limit of memory, so all is kept"
        *slower, taken = (
            f"{remat} does not compile" if size is None else f"{remat} needs {_gib(size)}"
            for remat, size in self.needs.items()
        )
        return f"remat: {self.remat}; of {_gib(self.limit)} " + ", ".join([taken, *slower])


def choose_remat(
    model: GemmaCausalLM, batch: Mapping[str, Any], limit: int | None = None, method: str = "lora"
) -> Choice:
    """Sets the fastest policy that fits, and gives it with the reason.

    Every policy down to the one taken is compiled, as `fit` would compile it: with JAX's persistent cache,
    which is on by default, `fit` then finds the program there and does not compile it again.

    Args:
        model: Compiled for training, its optimizer included.
        batch: One of those to come; only shapes count.
        limit: Bytes that the step may take; None: what the device reports.
        method: What the run trains, for the remedy.

    Raises:
        UserError: No policy fits.
    """
    limit = device_limit() if limit is None else limit
    if limit is None:
        set_remat(model, LADDER[0])
        return Choice(LADDER[0], {}, None)
    needs: dict[Remat, int | None] = {}
    for remat in LADDER:
        set_remat(model, remat)
        needs[remat] = size = step_bytes(model, batch)
        if size is not None and size <= limit:
            return Choice(remat, needs, limit)
    raise _nothing_fits(needs, limit, model, batch, method)


def device_limit() -> int | None:
    """Bytes that a training step may take of the first device; None where it does not say, such as CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(SHARE * stats["bytes_limit"]) if "bytes_limit" in stats else None


def set_remat(model: GemmaCausalLM, remat: Remat) -> None:
    """Lets training steps that are compiled from now on rematerialize so."""
    model.settings = dataclasses.replace(model.settings, remat=remat)
    model.train_function = None


def step_bytes(model: GemmaCausalLM, batch: Mapping[str, Any]) -> int | None:
    """Device memory of the model's compiled training step with all that it is given, in bytes.

    None where the compiler gives up because nothing fits, as it does for TPUs; where it knows no way to
    offload, as for GPUs with jax 0.11; or where it has no figures.
    """
    model.optimizer.build(model.trainable_variables)
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([variable.value for variable in group] for group in variables)
    data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(batch))

    def train_step(state: Any, data: Any) -> Any:
        # A function of its own, as JAX would not trace the same one again for other settings. With this name
        # and these options, as in Keras's trainer, the program is the one that `fit` looks up in the cache.
        return model.train_step(state, data)

    try:
        compiled = jax.jit(train_step, donate_argnums=0).lower(state, data).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and model.settings.remat != "offload":
            raise
        return None
    used = compiled.memory_analysis()
    if used is None:
        return None
    # Donated arguments are outputs too, and counted in both.
    kept = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return kept + used.temp_size_in_bytes + used.generated_code_size_in_bytes


def _nothing_fits(
    needs: Mapping[Remat, int | None],
    limit: int,
    model: GemmaCausalLM,
    batch: Mapping[str, Any],
    method: str,
) -> UserError:
    sizes = [size for size in needs.values() if size is not None]
    least = f"at least {_gib(min(sizes))}" if sizes else "more than the compiler can place"
    rows, length = batch["token_ids"].shape
    rows = model.micro_batch_size or rows
    remedies = [f"train.micro_batch_size below {rows}"] if rows > 1 else []
    remedies += [f"data.max_length below {length}"]
    remedies += ["method=qlora"] if method != "qlora" else ["quantization.embedding=int8"]
    return UserError(
        f"a training step needs {least}, and {_gib(limit)} of the device can be used",
        where="train.remat",
        remedy=f"choose {', '.join(remedies[:-1])} or {remedies[-1]}.",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
