"""Where compiled programs are kept."""

from pathlib import Path

from keras_gemma_ft.compilation import JAX_VARIABLE, VARIABLE, enable_cache


def directory(**environment: str) -> str | None:
    enable_cache(environment)
    return environment.get(JAX_VARIABLE)


def test_by_default_in_the_users_cache_directory():
    assert directory() == str(Path("~/.cache/keras_gemma_ft/compiled").expanduser())
    assert directory(XDG_CACHE_HOME="/var/cache/me") == "/var/cache/me/keras_gemma_ft/compiled"


def test_elsewhere_or_nowhere_if_asked_for():
    assert directory(**{VARIABLE: "/fast/disk"}) == "/fast/disk"
    assert directory(**{VARIABLE: "off"}) is None
    assert directory(**{JAX_VARIABLE: "/given/to/jax", VARIABLE: "/fast/disk"}) == "/given/to/jax"
