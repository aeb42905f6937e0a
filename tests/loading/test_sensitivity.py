"""The cost of noise in a layer's experts, on tiny models."""

import pytest

from mixchat.loading import sensitivity
from mixchat.loading.sensitivity import measure_sensitivities

IDS = list(range(5, 45))


@pytest.fixture(scope="module")
def model(make_checkpoint, install):
    return install(make_checkpoint(std=0.2, num_hidden_layers=3), quant_type="none")


def measured(model):
    layers = []
    found = measure_sensitivities(model, IDS, lambda done, count: layers.append((done, count)))
    assert layers == [(0, 3), (1, 3), (2, 3)]
    return found


def test_each_layer_has_a_cost_that_is_the_same_the_next_time(model):
    found = measured(model)
    assert all(cost > 0 for layer in found for cost in layer)
    assert measured(model) == found


def test_the_cost_is_of_squared_noise(model, monkeypatch):
    """KL divergence grows with the square, so half the noise gives the same figure."""
    whole = measured(model)
    monkeypatch.setattr(sensitivity, "_NOISE", sensitivity._NOISE / 2)
    for layer, half in zip(whole, measured(model), strict=True):
        assert half == pytest.approx(layer, rel=0.4)
