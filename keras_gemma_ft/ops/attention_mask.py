"""Who may attend to whom: the one definition that every rung of the attention ladder computes."""

import jax

# The name under which rungs mark what the backward pass needs of the forward pass, for
# `jax.checkpoint_policies.save_only_these_names(RESIDUALS)`.
RESIDUALS = "attention"


def may_attend(
    query_index: jax.Array,
    key_index: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    window: int | None,
) -> jax.Array:
    """Whether a query sees a key; the arguments broadcast, the result is boolean.

    The key is not later, belongs to the same example (segment 0 is padding and sees nothing), and is less
    than `window` tokens away: the query itself and window - 1 before it, as in transformers'
    `sliding_window_overlay`.
    """
    visible = (key_index <= query_index) & (query_segment == key_segment) & (query_segment != 0)
    if window is not None:
        visible &= query_index - key_index < window
    return visible
