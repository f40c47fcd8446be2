"""The packages of a wheel: the project's, and configs/ as one inside it. All else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["keras_gemma_ft*"]),
        "keras_gemma_ft.configs",
        *(f"keras_gemma_ft.configs.{name}" for name in find_namespace_packages("configs")),
    ],
    package_dir={"keras_gemma_ft.configs": "configs"},
)
