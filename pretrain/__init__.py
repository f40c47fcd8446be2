"""How the embedded preset `gemma4_tiny` came to be: its text, its vocabulary and its training.

Nothing here is part of the package: a user gets the result, `keras_gemma_ft/presets/gemma4_tiny`.
"""
