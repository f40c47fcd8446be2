"""LoRA on Gemma 4 E4B, with the fine-tuning guide's settings.

    keras-gemma-ft train --config=e4b_lora --workdir=runs/e4b_lora --config.data.train=train.jsonl

One GPU; the guide's memory budget for it is 18 GB. The per-layer embedding stays in the host's memory for it.
`train.micro_batch_size` and `train.remat` trade memory for speed and change nothing else.
"""

from ml_collections import ConfigDict

from keras_gemma_ft.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "gemma4_instruct_4b"
    config.method = "lora"
    config.quantization.per_layer_embedding = "host"
    config.train.micro_batch_size = 4
    config.train.remat = "down"
    return config
