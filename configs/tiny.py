"""The embedded default: LoRA on gemma4_tiny, offline, on a CPU.

    keras-gemma-ft train --config=tiny --workdir=runs/tiny

Copy this file for a recipe of your own. Every field, with its unit and recommended range, is in
`keras_gemma_ft/config.py`, and `keras-gemma-ft train --help` prints them.
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_tiny"
    config.precision = "float32"
    return config
