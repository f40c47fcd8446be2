"""Gemma 4 as a Keras model: its weights are Keras variables, its training step is pure functions."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import loading, lora, objective
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.gemma4 import Settings
from keras_gemma_ft.model.lora import LoraConfig
from keras_gemma_ft.model.objective import Batch
from keras_gemma_ft.model.weights import Weight, lora_targets, table
from keras_gemma_ft.ops import host
from keras_gemma_ft.ops.dropout import fold
from keras_gemma_ft.ops.quantize import Kind, QuantizedTensor

Named = Iterable[tuple[str, jax.Array | QuantizedTensor]]
Values = Callable[[keras.Variable], Any]

_TOKENIZER_FILES = {".json": "tokenizer.json", ".model": "tokenizer.model", ".spm": "tokenizer.model"}


@keras.saving.register_keras_serializable(package="keras_gemma_ft")
class GemmaCausalLM(keras.Model):
    """A Gemma 4 text decoder with its tied language-model head.

        model = GemmaCausalLM.from_preset("gemma4_instruct_4b", quantization="nf4")
        model.enable_lora(rank=16, alpha=32, dropout=0.05)
        model.compile(optimizer=keras_gemma_ft.optimizers.adamw(2e-4))
        model.fit(batches)

    Args:
        config: Of the decoder.
        weights: Named weights as `loading.load` gives them; None: random ones from `seed`.
        tokenizer: `keras_gemma_ft.data.Tokenizer`; needed to `generate` from text.
        preset: Where the weights came from: what exports merge adapters into.
        quantization: What is quantized, as for `from_preset`; must be that of `weights`.
        dtype: Keras dtype policy: "bfloat16", "float32", or "mixed_bfloat16" (float32 weights, bfloat16
            arithmetic: for training all weights).
        seed: Of random weights, adapters and dropout.
        name: Of the model.
    """

    def __init__(
        self,
        config: Gemma4Config,
        *,
        weights: Named | None = None,
        tokenizer: Any = None,
        preset: str | None = None,
        quantization: str | loading.Quantization | None = None,
        dtype: Any = "bfloat16",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.config = config
        self.tokenizer = tokenizer
        self.preset = preset
        self.quantization = loading.checked(quantization, config)
        self.lora: LoraConfig | None = None
        self.seed = seed
        self.settings = Settings(dtype=jnp.dtype(self.compute_dtype))
        self.micro_batch_size: int | None = None
        self.log_gradients = False
        self._adapters_on = True
        if weights is None:
            source = loading.RandomSource(config, seed, self.variable_dtype)
            weights = loading.load(source, self.variable_dtype, self.quantization)
        self._base: dict[str, Any] = {}
        self._adapters: dict[str, dict[str, keras.Variable]] = {}
        for weight_name, value in weights:
            self._base[weight_name] = self._stored(weight_name, value)
        self.seed_generator = keras.random.SeedGenerator(seed, name="seed_generator")
        self.built = True

    # ---------------------------------------------------------------- presets

    @classmethod
    def from_preset(
        cls,
        preset: str,
        quantization: str | Mapping[str, str] | None = None,
        dtype: str = "bfloat16",
        *,
        seed: int = 0,
    ) -> GemmaCausalLM:
        """The model of a preset: weights, vocabulary and configuration.

        Args:
            preset: `gemma4_tiny`, a local directory, `hf://ORG/NAME`, or a KerasHub name or handle.
            quantization: "nf4" or "int8" for all of the decoder's matrices, or a mapping from `weights`,
                `embedding` and `per_layer_embedding` to either; the last may also be "host": unquantized in
                the host's memory, from which steps fetch the rows that they look up. Tensors are quantized
                one by one as they are read: no unquantized model ever exists.
            dtype: Of what is not quantized; see the class.
            seed: Of adapters and dropout.

        Raises:
            UserError: There is no such preset, or its files are faulty.
        """
        from keras_gemma_ft.data.tokenizer import Tokenizer
        from keras_gemma_ft.presets import resolve_preset

        source = loading.open_source(resolve_preset(str(preset)))
        quantized = loading.checked(quantization, source.config)
        variable_dtype = keras.DTypePolicy(dtype).variable_dtype
        return cls(
            source.config,
            weights=loading.load(source, variable_dtype, quantized),
            tokenizer=Tokenizer.from_preset(preset),
            preset=str(preset),
            quantization=quantized,
            dtype=dtype,
            seed=seed,
        )

    @classmethod
    def from_keras_hub(cls, model: Any, dtype: str = "bfloat16") -> GemmaCausalLM:
        """Takes over the weights of a KerasHub `Gemma4CausalLM` or `Gemma4Backbone`."""
        from keras_gemma_ft.model.keras_hub import from_keras_hub

        source = from_keras_hub(model)
        return cls(source.config, weights=loading.load(source, dtype), dtype=dtype)

    def to_keras_hub(self) -> Any:
        """A stock KerasHub `Gemma4Backbone` with these weights, adapters merged."""
        from keras_gemma_ft.model.keras_hub import to_keras_hub

        return to_keras_hub(self.config, self.merged_part)

    def export_to_transformers(self, directory: str | Path) -> None:
        """Writes a merged Hugging Face directory; see docs/export.md."""
        from keras_gemma_ft.export.model import export_to_transformers

        export_to_transformers(self, Path(directory))

    def export_to_peft(self, directory: str | Path) -> None:
        """Writes the adapter as PEFT reads it; see docs/export.md."""
        from keras_gemma_ft.export.model import export_to_peft

        export_to_peft(self, Path(directory))

    # ---------------------------------------------------------------- adapters

    def enable_lora(
        self,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
    ) -> None:
        """Freezes the weights and puts adapters beside them, which alone are trained.

        Args:
            rank: Width of an adapter.
            alpha: An adapter's output is scaled by alpha / rank; None: 2 × rank.
            dropout: Share of an adapter's inputs dropped in training. Projections with the same input (q, k
                and v; gate and up) share its mask.
            targets: "all-linear": the seven projections of each layer; or roles.

        Raises:
            UserError: There are adapters already, or an argument does not fit.
        """
        if self.lora is not None:
            raise UserError(
                "the model has adapters already", "enable_lora", "load the preset again to have others."
            )
        names = targets if isinstance(targets, str) else ",".join(targets)
        made = LoraConfig(rank, 2.0 * rank if alpha is None else float(alpha), float(dropout), names)
        chosen = lora_targets(self.config, made.targets)
        for variable in self._base_variables():
            variable.trainable = False
        self._tracker.unlock()
        for weight in chosen:
            factors = lora.initial(weight, made.rank, self.seed)
            self._adapters[weight.name] = {
                factor: self._variable(f"{weight.name}/{factor}", value) for factor, value in factors.items()
            }
        self._tracker.lock()
        self.lora = made
        self.settings = dataclasses.replace(self.settings, lora_scale=made.scale, lora_dropout=made.dropout)
        self.train_function = self.test_function = None

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Within it, the model is its base (for `logits`, `generate` and `row_losses`)."""
        self._adapters_on = False
        try:
            yield
        finally:
            self._adapters_on = True

    def merged_part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        """One layer's weight, float32, dequantized if need be and with its adapter merged."""
        stored = self.params()[weight.name]
        part = stored[index] if index else stored
        if isinstance(part, QuantizedTensor):
            from keras_gemma_ft.ops.quantize import dequantize

            part = dequantize(part, jnp.float32)
        merged = np.asarray(part, np.float32)
        factors = self._adapters.get(weight.name)
        if factors is not None and self._adapters_on:
            a, b = (np.asarray(factors[name].value[index]) for name in ("lora_a", "lora_b"))
            merged = merged + self.settings.lora_scale * (b @ a)
        return merged

    # ---------------------------------------------------------------- use

    def params(self, values: Values = lambda variable: variable.value) -> dict[str, Any]:
        """The base weights by name, for the functions of `gemma4`.

        Args:
            values: Gives a variable's array.
        """
        return {
            name: values(stored) if isinstance(stored, keras.Variable) else _assembled(stored, values)
            for name, stored in self._base.items()
        }

    def adapters(self, values: Values = lambda variable: variable.value) -> dict[str, dict[str, Any]] | None:
        """The adapters' factors by name; None where there are none.

        While they are off, B is zero: that gives the base exactly, in the same compiled programs.
        """
        if not self._adapters:
            return None
        b = values if self._adapters_on else lambda variable: jnp.zeros_like(values(variable))
        return {
            name: {"lora_a": values(factors["lora_a"]), "lora_b": b(factors["lora_b"])}
            for name, factors in self._adapters.items()
        }

    def call(self, inputs: Any, training: bool = False) -> jax.Array:
        """float32 logits of token ids [rows, length], or of a `Batch`."""
        batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
        return self.logits(batch["token_ids"], batch.get("positions"), batch.get("segment_ids"))

    def logits(self, token_ids: Any, positions: Any = None, segment_ids: Any = None) -> jax.Array:
        """Logits of packed or plain rows, adapters included.

        Args:
            token_ids: int32 [rows, length].
            positions: int32 [rows, length]; None: 0, 1, 2, …
            segment_ids: int32 [rows, length], 0 is padding; None: each row is one example without padding.

        Returns:
            float32 [rows, length, vocabulary].
        """
        rows = _rows(token_ids, positions, segment_ids)
        return objective.logits(self.config, self._scanned, self.params(), self.adapters(), *rows)

    def row_losses(self, batch: Batch) -> jax.Array:
        """Summed loss of each row's supervised tokens in nats, float32 [rows]."""
        rows = _rows(batch["token_ids"], batch.get("positions"), batch.get("segment_ids"))
        mask = jnp.asarray(_loss_mask(batch))
        return objective.row_losses(self.config, self._scanned, self.params(), self.adapters(), *rows, mask)

    def generate(self, prompts: Any, max_new_tokens: int = 256, **sampling: Any) -> Any:
        """Answers to prompts; see `generation.generate` for the arguments."""
        from keras_gemma_ft.model.generation import generate

        return generate(self, prompts, max_new_tokens, **sampling)

    # ---------------------------------------------------------------- training

    def compile(
        self,
        optimizer: Any = "adamw",
        *,
        micro_batch_size: int | None = None,
        log_gradients: bool = False,
        settings: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Configures training. The loss is built in: the mean over all supervised tokens of a batch.

        Args:
            optimizer: A Keras optimizer, such as `keras_gemma_ft.optimizers.adamw()`.
            micro_batch_size: Rows on the device at once; None: the whole batch.
            log_gradients: Also log `squared_gradients` in training: by variable path, float32 [layers…].
            settings: Fields of `gemma4.Settings` to change, such as `remat`.
            others: As for `keras.Model.compile`.

        Raises:
            UserError: A loss is given.
        """
        if others.get("loss") is not None:
            raise UserError(
                "the loss of a language model is built in", "compile(loss=…)", "leave the loss out."
            )
        super().compile(optimizer=optimizer, **others)
        self.micro_batch_size = micro_batch_size
        self.log_gradients = log_gradients
        self.settings = dataclasses.replace(self.settings, **(settings or {}))

    def train_step(self, state: tuple[Any, ...], data: Any) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """One update; the frozen weights go through untouched, so that they are neither copied nor moved."""
        trainable, rest, optimizer, metrics = state
        key, rest = self._next_key(rest)
        sums = self._loss_sums(rest, training=True)
        loss, tokens, gradients = objective.accumulated(
            sums, trainable, _complete(data), key, self.micro_batch_size
        )
        share = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        gradients = [gradient * share for gradient in gradients]
        logs = {"loss": loss * share, "tokens": tokens, "grad_norm": optax.tree.norm(gradients)}
        if self.log_gradients:
            logs["squared_gradients"] = self._squared_by_layer(gradients)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return logs, (trainable, rest, optimizer, metrics)

    def test_step(self, state: tuple[Any, ...], data: Any) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The mean loss of a batch's supervised tokens, and their number; nothing is dropped out."""
        trainable, rest, metrics = state
        loss, tokens = self._loss_sums(rest, training=False)(trainable, _complete(data), None)
        mean = loss / jnp.maximum(tokens, 1).astype(jnp.float32)
        return {"loss": mean, "tokens": tokens}, (trainable, rest, metrics)

    def gradients(self, data: Any) -> tuple[float, int, dict[str, jax.Array]]:
        """Loss, supervised tokens and gradient by variable path of a batch; no dropout, no update."""
        trainable = [variable.value for variable in self.trainable_variables]
        rest = [variable.value for variable in self.non_trainable_variables]

        @jax.jit
        def compute(trainable: list[Any], rest: list[Any], batch: Batch) -> Any:
            sums = self._loss_sums(rest, training=False)
            loss, tokens, gradients = objective.accumulated(
                sums, trainable, batch, None, self.micro_batch_size
            )
            share = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
            return loss * share, tokens, [gradient * share for gradient in gradients]

        loss, tokens, gradients = compute(trainable, rest, _complete(data))
        paths = [variable.path for variable in self.trainable_variables]
        return float(loss), int(tokens), dict(zip(paths, gradients, strict=True))

    def _loss_sums(self, rest: list[Any], training: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """The function (trainable, batch, key) → (summed loss, supervised tokens)."""
        frozen = {id(v): value for v, value in zip(self.non_trainable_variables, rest, strict=True)}

        def sums(trainable: list[Any], batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            mine = {id(v): value for v, value in zip(self.trainable_variables, trainable, strict=True)}
            values = {**frozen, **mine}
            params = self.params(lambda variable: values[id(variable)])
            adapters = self.adapters(lambda variable: values[id(variable)])
            return objective.loss_sum(
                self.config,
                self.settings if training else self._scanned,
                params,
                adapters,
                batch,
                key if training else None,
                train_embedding=id(self._base["embed_tokens"]) in mine,
            )

        return sums

    @property
    def _scanned(self) -> Settings:
        """The settings where nothing is differentiated: layers written out would only compile more slowly."""
        return dataclasses.replace(self.settings, unroll=False)

    def _squared_by_layer(self, gradients: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """Squared norm of each trainable variable's gradient, by path; one for each layer that it stacks."""
        weights = table(self.config)
        squared = {}
        for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
            weight = weights[lora.weight_name(variable.path)]
            axes = weight.layers.ndim if weight.in_layers else 0
            squares = jnp.square(gradient.astype(jnp.float32))
            squared[variable.path] = squares.sum(tuple(range(axes, squares.ndim)))
        return squared

    def _next_key(self, rest: list[Any]) -> tuple[jax.Array, list[Any]]:
        """A dropout key for this step, and the other variables with the generator one step on."""
        state = self.seed_generator.state
        place = next(i for i, v in enumerate(self.non_trainable_variables) if v is state)
        key = rest[place].astype(jnp.uint32)
        counted = rest[place] + jnp.asarray([0, 1], rest[place].dtype)
        return fold(key, 0), [*rest[:place], counted, *rest[place + 1 :]]

    # ---------------------------------------------------------------- Keras

    def get_config(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "preset": self.preset,
            "quantization": dict(self.quantization),
            "lora": None if self.lora is None else self.lora.to_json(),
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "seed": self.seed,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GemmaCausalLM:
        decoder = Gemma4Config(**{**config["config"], "layer_types": tuple(config["config"]["layer_types"])})
        dtype = keras.saving.deserialize_keras_object(config["dtype"])
        model = cls(
            decoder,
            weights=_blank(decoder, config["quantization"], dtype.variable_dtype),
            preset=config["preset"],
            quantization=config["quantization"],
            dtype=dtype,
            seed=config["seed"],
            name=config["name"],
        )
        if config["lora"] is not None:
            model.enable_lora(**config["lora"])
        return model

    def save_own_variables(self, store: Any) -> None:
        for variable in [*self._base_variables(), *self._adapter_variables()]:
            store[self._key(variable)] = variable.value

    def load_own_variables(self, store: Any) -> None:
        for variable in [*self._base_variables(), *self._adapter_variables()]:
            value = store[self._key(variable)]
            variable.assign(host.place(np.asarray(value)) if host.holds(variable.value) else value)

    def save_assets(self, directory: str) -> None:
        if self.tokenizer is not None:
            name = _TOKENIZER_FILES[self.tokenizer.path.suffix]
            (Path(directory) / name).write_bytes(self.tokenizer.serialized)

    def load_assets(self, directory: str) -> None:
        from keras_gemma_ft.data.tokenizer import Tokenizer

        for name in set(_TOKENIZER_FILES.values()):
            if (Path(directory) / name).is_file():
                self.tokenizer = Tokenizer.from_file(_kept(Path(directory) / name))

    def _key(self, variable: keras.Variable) -> str:
        return variable.path.removeprefix(f"{self.name}/").replace("/", ".")

    def _base_variables(self) -> Iterator[keras.Variable]:
        for stored in self._base.values():
            yield from [stored] if isinstance(stored, keras.Variable) else stored.values()

    def _adapter_variables(self) -> Iterator[keras.Variable]:
        for factors in self._adapters.values():
            yield from factors.values()

    def _stored(self, name: str, value: Any) -> Any:
        """A weight as a variable; a quantized one as its parts, which never train."""
        if not isinstance(value, QuantizedTensor):
            return self._variable(name, value, trainable=not host.holds(value))
        parts = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name != "kind" and getattr(value, field.name) is not None
        }
        return {
            f"{value.kind}_{part}": self._variable(f"{name}/{value.kind}_{part}", array, trainable=False)
            for part, array in parts.items()
        }

    def _variable(self, path: str, value: Any, trainable: bool = True) -> keras.Variable:
        """A variable at `path` below the model, without a copy of its array."""
        *scopes, leaf = path.split("/")
        with _scopes(self, scopes):
            return keras.Variable(
                jnp.asarray(value), name=leaf, trainable=trainable, dtype=str(value.dtype), autocast=False
            )


# --- Small things -------------------------------------------------------------------------------------------


def _assembled(parts: Mapping[str, keras.Variable], values: Values) -> QuantizedTensor:
    kind: Kind = "nf4" if "nf4_codes" in parts else "int8"
    arrays = {name.removeprefix(f"{kind}_"): values(variable) for name, variable in parts.items()}
    return QuantizedTensor(
        arrays["codes"], arrays["absmax"], arrays.get("nested"), arrays.get("offset"), kind
    )


def _blank(config: Gemma4Config, quantization: Any, dtype: str) -> Named:
    """Zeros in the place of all weights, stored as they will be."""
    from keras_gemma_ft.ops.quantize import quantize

    for weight in table(config).values():
        kind = loading.kind_of(weight, quantization)
        shape: Any = jax.ShapeDtypeStruct(weight.stacked_shape, dtype)
        if kind == "host":
            yield weight.name, host.place(np.zeros(shape.shape, shape.dtype))
            continue
        if kind is not None:
            shape = jax.eval_shape(partial(quantize, kind=kind), shape)
        yield weight.name, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)


def _rows(token_ids: Any, positions: Any, segment_ids: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    ids = jnp.asarray(token_ids, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(ids)
    return ids, jnp.asarray(positions, jnp.int32), jnp.asarray(segment_ids, jnp.int32)


def _loss_mask(batch: Batch) -> Any:
    if "loss_mask" not in batch:
        raise UserError(
            "a batch has no loss_mask, so it does not say which tokens are to be learned",
            where="fit",
            remedy="give dicts with token_ids and loss_mask, such as keras_gemma_ft.data.tf_dataset makes.",
        )
    return batch["loss_mask"]


def _complete(data: Any) -> dict[str, jax.Array]:
    batch = data[0] if isinstance(data, tuple) else data
    if not isinstance(batch, Mapping) or "token_ids" not in batch:
        raise UserError(
            "a batch is no dict with token_ids",
            where="fit",
            remedy="give dicts with token_ids and loss_mask, such as keras_gemma_ft.data.tf_dataset makes.",
        )
    ids, positions, segments = _rows(batch["token_ids"], batch.get("positions"), batch.get("segment_ids"))
    mask = jnp.asarray(_loss_mask(batch), bool)
    return {"token_ids": ids, "positions": positions, "segment_ids": segments, "loss_mask": mask}


def _kept(asset: Path) -> Path:
    """A copy of a file of a saved model, whose own place is gone once it is loaded; for this process."""
    place = Path(tempfile.mkdtemp(prefix="keras_gemma_ft_"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return Path(shutil.copy(asset, place))


@contextmanager
def _scopes(model: keras.Model, names: Sequence[str]) -> Iterator[None]:
    """Keras's name scopes of a place below the model."""
    if not names:
        with keras.name_scope(model.name, caller=model):
            yield
        return
    with _scopes(model, names[:-1]), keras.name_scope(names[-1]):
        yield
