"""JAX's compilation cache on disk: what one process has compiled, the next one finds."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE, JAX_VARIABLE = "KERAS_GEMMA_FT_CACHE", "JAX_COMPILATION_CACHE_DIR"


def enable_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tells JAX, before it is imported, to keep compiled programs in the user's cache directory.

    $KERAS_GEMMA_FT_CACHE names another directory, or is "off". A directory given to JAX itself stays. JAX
    looks a program up by its text, its options, the device and the compiler's version: what is found is what
    would have been compiled. Programs that took less than a second are not kept; a directory that cannot be
    written to costs a warning from JAX and nothing else.
    """
    given = environment.get(VARIABLE, "")
    if given.lower() == "off":
        return
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(given) if given else Path(base) / "keras_gemma_ft" / "compiled"
    environment.setdefault(JAX_VARIABLE, str(directory.expanduser()))
