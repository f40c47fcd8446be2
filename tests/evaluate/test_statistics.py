"""Intervals and paired tests, against closed forms and scipy."""

import math

import numpy as np
import pytest

from keras_gemma_ft.evaluate.statistics import compare, divide, mcnemar, mean_metric, ratio_metric, resample


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    (comparison,) = compare(None, [mean_metric("m", "m", values)], resamples=4000)
    error = values.std() / math.sqrt(values.size)
    assert comparison.tuned.value == pytest.approx(values.mean())
    assert comparison.tuned.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert comparison.tuned.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert comparison.base is None
    assert comparison.p_value is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        sample = generator.random(300) < 0.3
        (comparison,) = compare(None, [mean_metric("m", "m", sample)], resamples=400, seed=seed)
        covered += comparison.tuned.low <= 0.3 <= comparison.tuned.high
    assert 180 <= covered <= 199  # 95% of 200 is 190, with a standard deviation of 3


def test_mcnemar_is_the_exact_binomial_on_discordant_rows():
    base = np.array([1] * 50 + [0] * 12 + [1] * 3 + [0] * 40, bool)
    tuned = np.array([1] * 50 + [1] * 12 + [0] * 3 + [0] * 40, bool)
    tail = sum(math.comb(15, k) for k in range(4)) / 2**15
    assert mcnemar(base, tuned) == pytest.approx(2 * tail)
    assert mcnemar(tuned, base) == pytest.approx(2 * tail)
    assert mcnemar(base, base) == 1.0


def test_pairing_finds_a_small_steady_gain_that_two_intervals_hide():
    generator = np.random.default_rng(2)
    base = generator.normal(2.0, 1.0, 300)  # rows differ much from each other ...
    tuned = base - 0.05 + generator.normal(0, 0.05, 300)  # ... and each improves a little
    ones = np.ones(300)
    (comparison,) = compare(
        [ratio_metric("loss", "loss", base, ones, better="lower")],
        [ratio_metric("loss", "loss", tuned, ones, better="lower")],
    )
    assert comparison.tuned.high > comparison.base.low  # the intervals overlap
    assert comparison.difference.high < 0
    assert comparison.p_value < 0.01
    assert comparison.test == "paired bootstrap"


def test_a_model_against_itself_is_no_different():
    scores = mean_metric("x", "x", np.random.default_rng(3).random(100))
    (comparison,) = compare([scores], [scores])
    assert comparison.difference.low == comparison.difference.high == 0
    assert comparison.p_value == 1


def test_p_values_under_the_null_are_uniform_enough():
    generator = np.random.default_rng(4)
    p_values = []
    for seed in range(300):
        base, tuned = generator.normal(0, 1, (2, 80))
        (comparison,) = compare(
            [mean_metric("x", "x", base)], [mean_metric("x", "x", tuned)], resamples=200, seed=seed
        )
        p_values.append(comparison.p_value)
    assert 0.02 <= np.mean(np.asarray(p_values) < 0.05) <= 0.09


def test_the_loss_is_per_token_and_not_per_row():
    metric = ratio_metric("loss", "loss", [10.0, 1.0], [100, 1], better="lower")
    assert metric.value == pytest.approx(11 / 101)


def test_metrics_resampled_together_see_the_same_rows():
    values = np.random.default_rng(5).random(50)
    samples = resample([mean_metric("a", "a", values), mean_metric("b", "b", 1 - values)])
    np.testing.assert_allclose(samples[0] + samples[1], 1)


def test_resampling_is_refused_without_rows_or_over_different_rows():
    with pytest.raises(ValueError, match="cannot be resampled"):
        resample([mean_metric("a", "a", [])])
    with pytest.raises(ValueError, match="cannot be resampled"):
        resample([mean_metric("a", "a", [1.0]), mean_metric("b", "b", [1.0, 0.0])])


def test_dividing_by_zero_gives_zero():
    np.testing.assert_array_equal(divide(np.array([1.0, 2.0]), np.array([0.0, 4.0])), [0, 0.5])
