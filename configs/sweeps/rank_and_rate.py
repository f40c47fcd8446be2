"""Rank and learning rate over the guide's ranges: nine trials of one epoch, the best three again with three.

    keras-gemma-ft sweep --config=e4b_lora --sweep=rank_and_rate --workdir=runs/rank_and_rate \\
        --config.data.train=train.jsonl

That is 18 epochs; all nine with three would be 27. `alpha` follows the rank, as 2 × rank, unless the config
sets it. Copy this file for a sweep of your own: any config field can be tried, in any number of rounds.
"""

from keras_gemma_ft.train.sweep import Sweep


def get_sweep() -> Sweep:
    return Sweep(
        parameters={
            "lora.rank": [16, 32, 64],
            "train.learning_rate": [1e-4, 2e-4, 3e-4],
        },
        budget_field="train.epochs",
        budgets=[1, 3],
        keep=3,
    )
