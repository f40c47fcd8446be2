"""Dropout, for a run that overfits: four trials of three epochs.

    keras-gemma-ft sweep --config=e4b_lora --sweep=dropout --workdir=runs/dropout \\
        --config.data.train=train.jsonl

One round only: what dropout is good for shows late in a run. A trial's value is its best held-out loss, so an
earlier epoch that was better counts.
"""

from keras_gemma_ft.train.sweep import Sweep


def get_sweep() -> Sweep:
    return Sweep(parameters={"lora.dropout": [0.0, 0.05, 0.1, 0.2]}, budgets=[3])
