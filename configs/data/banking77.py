"""Banking77: one of 77 intents for a message to a bank (CSV with `text` and `category`), by full fine-tuning.

    keras-gemma-ft train --config=data/banking77 --workdir=runs/banking77 \\
        --config.data.train=banking77/train.csv --config.data.eval=banking77/test.csv

Casanueva et al. 2020, arXiv:2003.04807.
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_tiny"
    config.method = "full"
    config.precision = "float32"
    config.data.template = "Classify: {text}"
    config.data.response = "category"
    config.data.max_length = 160
    config.train.learning_rate = 1e-3
    config.train.batch_size = 8
    config.train.epochs = 3
    config.train.remat = "none"
    config.train.eval_every = 300
    config.task.kind = "classification"
    return config
