"""The schema: its defaults are the guide's, and what is wrong is named."""

import pytest

from keras_gemma_ft.config import (
    FIELDS,
    config_from,
    default_config,
    describe,
    flatten,
    validate,
    weights_quantization,
)
from keras_gemma_ft.errors import UserError


def usable(**changes):
    config = default_config()
    config.data.train = "train.jsonl"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def test_defaults_are_the_guides():
    config = usable()
    validate(config)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets) == (
        16,
        None,
        0.05,
        "all-linear",
    )
    train = config.train
    assert (train.learning_rate, train.schedule, train.warmup_ratio, train.epochs) == (2e-4, "cosine", 0.1, 3)
    assert (train.batch_size, train.clip_norm) == (16, 1.0)


def test_every_field_says_what_it_is_and_stands_in_the_help():
    text = describe()
    for field in FIELDS:
        assert field.about
        assert f"{field.name} = " in text
        assert (field.default is None) <= bool(field.none), field.name


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"lora__rank": 0}, "lora.rank", "1 or more"),
        ({"data__eval_fraction": 0.9}, "data.eval_fraction", "0.001 to 0.5"),
        ({"method": "lorra"}, "method", "did you mean lora"),
        ({"train__schedule": "cosin"}, "train.schedule", "did you mean cosine"),
        ({"lora__dropout": 1.0}, "lora.dropout", "below 1"),
        ({"train__learning_rate": 0.0}, "train.learning_rate", "more than 0"),
        ({"train__learning_rate": float("nan")}, "train.learning_rate", "more than 0"),
        ({"train__micro_batch_size": 3}, "train.micro_batch_size", "1, 2, 4, 8 or 16"),
        ({"quantization__weights": "nf4"}, "quantization.weights", "qlora"),
        ({"data__train": ""}, "data.train", "--config.data.train"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(changes, where, says):
    with pytest.raises(UserError) as error:
        validate(usable(**changes))
    assert error.value.where == where
    assert says in error.value.remedy
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("values", "where", "remedy"),
    [
        ({"lora": {"rnak": 3}}, "lora.rnak", "did you mean lora.rank?"),
        ({"rank": 3}, "rank", "did you mean lora.rank?"),
        ({"lora": {"rank": "16"}}, "lora.rank", "it is width"),
        ({"train": {"epochs": True}}, "train.epochs", "it is times"),
        ({"train": {"epochs": None}}, "train.epochs", ""),
        ({"nothing": {"like": 1}}, "nothing.like", "the fields are"),
    ],
)
def test_values_from_a_file_are_checked_by_name_and_type(values, where, remedy):
    with pytest.raises(UserError) as error:
        config_from({"data": {"train": "x.jsonl"}, **values})
    assert error.value.where == where
    assert error.value.remedy.startswith(remedy)


def test_a_misspelt_field_in_a_recipe_fails_where_it_is_set():
    with pytest.raises(AttributeError, match="rnak"):
        default_config().lora.rnak = 3


def test_none_can_be_set_where_it_means_something():
    config = usable()
    config.train.clip_norm = None
    validate(config)
    assert config.train.clip_norm is None


def test_a_config_survives_the_way_through_json():
    config = usable(lora__alpha=8.0, train__max_steps=7)
    assert dict(flatten(config_from(config.to_dict()))) == dict(flatten(config))


def test_qlora_means_nf4_unless_said_otherwise():
    assert weights_quantization(usable()) is None
    assert weights_quantization(usable(method="qlora")) == {"weights": "nf4"}
    changed = usable(method="qlora", quantization__weights="int8", quantization__embedding="nf4")
    assert weights_quantization(changed) == {"weights": "int8", "embedding": "nf4"}
