"""A language model of two matrices with the contract of `GemmaCausalLM`: dicts, micro-batches, dropout."""

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_gemma_ft.data.dataset import PackedDataset
from keras_gemma_ft.data.packing import PackedRows
from keras_gemma_ft.train.examples import Examples

VOCABULARY, WIDTH, LENGTH = 50, 16, 12


class ToyModel(keras.Model):
    """Predicts a token from the one before it. `base` is frozen; `adapter` and `head` learn."""

    def __init__(self, dropout: float = 0.2, seed: int = 0) -> None:
        super().__init__(name="toy")
        initial = keras.initializers.RandomNormal(0.1, seed=seed)
        self.base = self.add_weight(
            shape=(VOCABULARY, WIDTH), initializer=initial, trainable=False, name="base"
        )
        self.adapter = self.add_weight(shape=(VOCABULARY, WIDTH), initializer="zeros", name="adapter")
        self.head = self.add_weight(shape=(WIDTH, VOCABULARY), initializer=initial, name="head")
        self.dropout = keras.layers.Dropout(dropout, seed=seed)
        self.built = True
        self.micro_batch_size: int | None = None

    def compile(self, micro_batch_size: int | None = None, log_gradients: bool = False, **settings):
        super().compile(**settings)
        self.log_gradients = log_gradients
        self.micro_batch_size = micro_batch_size

    def call(self, token_ids, training=False):
        hidden = jnp.take(self.base + self.adapter, token_ids, axis=0)
        return self.dropout(hidden, training=training) @ self.head

    def _sums(self, trainable, rest, batch, training):
        logits, rest = self.stateless_call(trainable, rest, batch["token_ids"][:, :-1], training=training)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["token_ids"][:, 1:, None], -1)[..., 0]
        mask = batch["loss_mask"][:, 1:]
        return (losses * mask).sum(), (mask.sum(), rest)

    def train_step(self, state, batch):
        trainable, rest, optimizer, metrics = state
        rows = batch["token_ids"].shape[0]
        gradients, loss, tokens = [jnp.zeros_like(value) for value in trainable], 0.0, 0
        size = self.micro_batch_size or rows
        for start in range(0, rows, size):
            part = {name: value[start : start + size] for name, value in batch.items()}
            compute = jax.value_and_grad(self._sums, has_aux=True)
            (part_loss, (part_tokens, rest)), part_gradients = compute(trainable, rest, part, True)
            gradients = [a + b for a, b in zip(gradients, part_gradients, strict=True)]
            loss, tokens = loss + part_loss, tokens + part_tokens
        gradients = [gradient / jnp.maximum(tokens, 1) for gradient in gradients]
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        logs = {"loss": loss / tokens, "tokens": tokens}
        if self.log_gradients:
            squared = [jnp.square(gradient).sum() for gradient in gradients]
            logs["squared_gradients"] = dict(zip(self._paths(), squared, strict=True))
        return logs, (trainable, rest, optimizer, metrics)

    def _paths(self):
        return [variable.path for variable in self.trainable_variables]

    def test_step(self, state, batch):
        trainable, rest, metrics = state
        loss, (tokens, _) = self._sums(trainable, rest, batch, False)
        return {"loss": loss / tokens, "tokens": tokens}, (trainable, rest, metrics)


def rows(count: int, seed: int = 0) -> PackedDataset:
    """Rows in which each token is the one before plus one: learnable, of random starts and lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(LENGTH // 2, LENGTH + 1, (count, 1))
    there = np.arange(LENGTH) < lengths
    tokens = (random.integers(0, VOCABULARY, (count, 1)) + np.arange(LENGTH)) % VOCABULARY
    return PackedDataset.from_rows(
        PackedRows(
            np.where(there, tokens, 0).astype(np.int32),
            there.astype(np.uint16),
            there & (np.arange(LENGTH) > 0),
        )
    )


def examples(train: int = 40, held_out: int = 10) -> Examples:
    return Examples(rows(train), rows(held_out, seed=1), train, held_out, {"sha256": "toy"})
