"""What a wheel holds: every file of the package and every recipe, found again where it is installed."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import keras_gemma_ft

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was unpacked; built from a copy, so that the clone stays clean."""
    copy, wheels, site = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "site"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("keras_gemma_ft", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(copy)]
    result = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def files(folder: Path) -> set[str]:
    kept = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in kept}


def test_every_file_of_the_package_is_in_the_wheel(installed):
    expected = files(ROOT / "keras_gemma_ft") | {f"configs/{name}" for name in files(ROOT / "configs")}
    assert {"py.typed", "evaluate/templates/report.html.jinja", "configs/tiny.py"} <= expected
    assert files(installed / "keras_gemma_ft") == expected
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"keras_gemma_ft"}


def test_an_installed_package_finds_its_recipes_and_presets(installed, tmp_path):
    script = """
import keras_gemma_ft
from keras_gemma_ft.presets import embedded_presets
from keras_gemma_ft.recipes import read_recipe, shipped, shipped_sweeps
print(keras_gemma_ft.__file__, read_recipe("tiny").preset)
print(*shipped().values(), *shipped_sweeps().values(), *embedded_presets().values())
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    package, preset, *places = result.stdout.split()
    assert preset == "gemma4_tiny"
    assert all(place.startswith(str(installed)) for place in (package, *places))
    assert len(places) > len(files(ROOT / "configs"))


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == keras_gemma_ft.__version__
