"""Finding and running llama.cpp's converter, for which small scripts stand in."""

from pathlib import Path

import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export import gguf

COPYING = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile")
parser.add_argument("--outtype")
given = parser.parse_args()
text = (pathlib.Path(given.model) / "config.json").read_text()
pathlib.Path(given.outfile).write_text(given.outtype + " " + text)
"""
FAILING = """
import sys, pathlib
pathlib.Path(sys.argv[3]).write_text("half")
sys.exit("ModuleNotFoundError: No module named 'gguf'")
"""


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def _script(tmp_path: Path, source: str) -> Path:
    path = tmp_path / gguf.CONVERTER
    path.write_text(source)
    return path


def test_the_converter_is_found(tmp_path):
    script = _script(tmp_path, COPYING)
    script.chmod(0o755)
    assert gguf.find_converter(tmp_path, {}) == script
    assert gguf.find_converter(script, {}) == script
    assert gguf.find_converter(None, {"LLAMA_CPP": str(tmp_path)}) == script
    assert gguf.find_converter(None, {"PATH": str(tmp_path)}) == script


def test_without_a_converter_the_user_is_told_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="git clone"):
        gguf.find_converter(None, {"PATH": str(tmp_path)})
    with pytest.raises(UserError, match="there is no convert_hf_to_gguf"):
        gguf.find_converter(tmp_path, {})


def test_conversion(tmp_path, merged):
    gguf.convert(merged, tmp_path / "model.gguf", _script(tmp_path, COPYING), "bf16")
    assert (tmp_path / "model.gguf").read_text() == "bf16 {}"


def test_a_failed_conversion_leaves_nothing_and_says_why(tmp_path, merged):
    with pytest.raises(UserError, match="No module named 'gguf'"):
        gguf.convert(merged, tmp_path / "model.gguf", _script(tmp_path, FAILING))
    assert not list(tmp_path.glob("*model.gguf*"))


def test_unknown_type(tmp_path, merged):
    with pytest.raises(UserError, match="choose one of f32, f16, bf16, q8_0, auto"):
        gguf.convert(merged, tmp_path / "model.gguf", _script(tmp_path, COPYING), "q3_k_xs")
