"""The embedded default: LoRA on gemma4_tiny, offline, on a CPU.

It learns which office of a town hall answers a message.

    keras-gemma-ft train --config=tiny --workdir=runs/tiny

Copy this file for a recipe of your own. Every field, with its unit and recommended range, is in
`keras_gemma_ft/config.py`, and `keras-gemma-ft train --help` prints them. A model of 3 M parameters needs a
higher learning rate than the real ones.
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config
from keras_gemma_ft.presets import DEMO


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_tiny"
    config.precision = "float32"
    config.data.train = str(DEMO / "train.jsonl")
    config.data.eval = str(DEMO / "held_out.jsonl")
    config.data.max_length = 128
    config.train.learning_rate = 4e-3
    config.train.batch_size = 4
    config.train.epochs = 1
    config.train.remat = "none"
    config.train.eval_every = 20
    config.task.kind = "classification"
    return config
