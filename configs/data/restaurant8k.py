"""Restaurants-8k: the slots that a message names (people, time, date, first and last name), as a JSON object.

    keras-gemma-ft train --config=data/restaurant8k --workdir=runs/restaurant8k \\
        --config.data.train=restaurant8k/train_0.json --config.data.eval=restaurant8k/test.json

A row is a text with spans (`data.layout = spans`). The slots that the system has just asked for are part of
the question, as "13" alone may be a time or a number of people. Coope et al. 2020 (Span-ConveRT).
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_tiny"
    config.method = "full"
    config.precision = "float32"
    config.data.layout = "spans"
    config.data.prompt = "userInput.text"
    config.data.response = "labels"
    config.data.template = "Slots ({context.requestedSlots:any}): {userInput.text}"
    config.data.max_length = 256
    config.train.learning_rate = 1e-3
    config.train.batch_size = 8
    config.train.epochs = 3
    config.train.remat = "none"
    config.train.eval_every = 100
    config.task.kind = "extraction"
    return config
