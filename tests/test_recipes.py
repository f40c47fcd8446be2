"""Every recipe that is shipped loads, is valid once it has data, and says its own command."""

import pytest

from keras_gemma_ft.config import validate
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.recipes import read_recipe, read_run_config, shipped


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_is_valid_and_says_its_command(name):
    config = read_recipe(name)
    config.data.train = "train.jsonl"
    validate(config)
    assert f"keras-gemma-ft train --config={name} --workdir=runs/" in shipped()[name].read_text()
    if name != "tiny" and not name.startswith("data/"):
        assert name.endswith(f"_{config.method}")


def test_names_and_paths_find_the_same_recipe():
    assert (
        read_recipe("tiny").to_dict()
        == read_recipe("tiny.py").to_dict()
        == read_recipe("configs/tiny.py").to_dict()
    )
    with pytest.raises(UserError, match="no such config file"):
        read_recipe("elsewhere/tiny.py")


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text('{"lora": {"rank": 0}}')
    with pytest.raises(UserError, match=r"lora\.rank: 0 is out of range"):
        read_run_config(tmp_path)
