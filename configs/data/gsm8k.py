"""GSM8K: word problems with an answer that ends in `#### NUMBER` (JSON lines with `question` and `answer`).

    keras-gemma-ft train --config=data/gsm8k --workdir=runs/gsm8k \\
        --config.data.train=gsm8k/train.jsonl --config.data.eval=gsm8k/test.jsonl

A model as small as gemma4_tiny learns the form of the answers and hardly any arithmetic: add
`--config.preset=gemma4_instruct_2b --config.method=lora --config.train.learning_rate=2e-4` for one that
calculates. Cobbe et al. 2021, arXiv:2110.14168.
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_tiny"
    config.method = "full"
    config.precision = "float32"
    config.data.prompt = "question"
    config.data.response = "answer"
    config.data.max_length = 512
    config.train.learning_rate = 1e-3
    config.train.batch_size = 8
    config.train.epochs = 1
    config.train.remat = "none"
    config.train.eval_every = 100
    config.task.kind = "numeric"
    return config
