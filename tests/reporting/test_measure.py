"""Gradient error and interleaved times."""

import pytest
import torch

from spikefit.errors import TrainingError
from spikefit.reporting.measure import gradient_error, interleaved_seconds

REFERENCE = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.5])}


def test_error_is_the_worst_parameter_relative_to_its_largest_gradient():
    got = {"a": torch.tensor([1.0, -3.5]), "b": torch.tensor([0.625])}
    assert gradient_error(got, REFERENCE) == 0.25
    assert gradient_error({**got, "b": REFERENCE["b"]}, REFERENCE) == 0.125
    assert gradient_error(REFERENCE, REFERENCE) == 0.0


def test_a_gradient_where_there_should_be_none_is_a_huge_finite_error():
    zero = {"a": torch.zeros(2)}
    assert gradient_error(zero, zero) == 0.0
    assert 1e30 < gradient_error({"a": torch.ones(2)}, zero) < float("inf")


def test_not_finite_or_missing_gradients_are_named():
    with pytest.raises(TrainingError, match="gradient of b is not finite"):
        gradient_error({**REFERENCE, "b": torch.tensor([float("nan")])}, REFERENCE)
    with pytest.raises(TrainingError, match="different parameters: b"):
        gradient_error({"a": REFERENCE["a"]}, REFERENCE)


def test_steps_take_turns_and_the_first_round_does_not_count():
    now, order = [0.0], []

    def step(name, cost, first):
        def run():
            order.append(name)
            now[0] += first if order.count(name) == 1 else cost

        return run

    steps = {"x": step("x", 1.0, 50.0), "y": step("y", 3.0, 90.0)}
    assert interleaved_seconds(steps, rounds=3, budget=1e9, clock=lambda: now[0]) == {"x": 1.0, "y": 3.0}
    assert order == ["x", "y", "y", "x", "x", "y", "y", "x"]


def test_the_budget_stops_after_three_rounds():
    now = [0.0]

    def slow():
        now[0] += 10

    seen = []
    interleaved_seconds({"x": lambda: (slow(), seen.append(1))}, rounds=100, budget=5, clock=lambda: now[0])
    assert len(seen) == 4
