"""A recording runner notes what experts are given, and changes nothing."""

import torch

from mixchat.experts.recording_runner import RecordingRunner


def test_the_choice_is_recorded_and_the_result_is_the_runners():
    hidden, weights = torch.ones(3, 8), torch.rand(3, 2)
    calls, recorded = [], []

    class Runner:
        def run(self, *inputs, exact=False):
            calls.append((*inputs, exact))
            return hidden * 2

    runner = RecordingRunner(Runner(), lambda *inputs: recorded.append(inputs))
    for layer in range(2):
        selected = torch.tensor([[0, 1], [2, 3], [1, 0]])
        assert torch.equal(runner.run(layer, hidden, selected, weights, exact=True), hidden * 2)
        assert calls[layer] == (layer, hidden, selected, weights, True)
        assert recorded[layer] == (layer, hidden, selected)
