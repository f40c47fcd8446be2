"""Trains the toy model in a process: toy_run.py DIR [--resume --kill=STEP --signal=STEP --no-tensorflow]."""

import os
import signal
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import toy_model

from keras_gemma_ft.config import default_config
from keras_gemma_ft.train import run
from keras_gemma_ft.train.batches import Batches
from keras_gemma_ft.train.interruption import Interrupted


def config():
    made = default_config()
    made.data.train = "toy"
    made.train.update(
        {"batch_size": 8, "micro_batch_size": 4, "epochs": 8, "learning_rate": 0.05, "eval_every": 10}
    )
    return made


class SendAt(keras.callbacks.Callback):
    """Sends this process a signal after its step of that number."""

    def __init__(self, number, step):
        super().__init__()
        self.number, self.step, self.begun = number, step, 0

    def on_train_batch_end(self, batch, logs=None):
        self.begun += 1
        if self.begun == self.step:
            os.kill(os.getpid(), self.number)


def main(workdir, *options):
    if "--no-tensorflow" in options:
        sys.modules["tensorflow"] = None  # importing it fails
        Batches.feed = lambda batches: batches
    values = dict(option.lstrip("-").partition("=")[::2] for option in options)
    callbacks = [SendAt(signal.SIGKILL, int(values["kill"]))] if "kill" in values else []
    if "signal" in values:
        callbacks.append(SendAt(signal.SIGINT, int(values["signal"])))
    try:
        run.fit(
            toy_model.ToyModel(),
            toy_model.examples(),
            config(),
            workdir,
            resume="resume" in values,
            callbacks=callbacks,
        )
    except Interrupted as stop:
        print(stop)
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    main(*sys.argv[1:])
