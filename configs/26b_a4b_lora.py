"""LoRA on Gemma 4 26B-A4B, with the fine-tuning guide's settings.

    keras-gemma-ft train --config=26b_a4b_lora --workdir=runs/26b_a4b_lora --config.data.train=train.jsonl

One GPU; the guide's memory budget for it is 48 GB. `train.micro_batch_size` trades memory for speed and
changes nothing else.
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_instruct_26b_a4b"
    config.method = "lora"
    config.train.micro_batch_size = 2
    return config
