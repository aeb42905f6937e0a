"""The disk and the memory that calibrating attention and head takes."""

import pytest

from mixchat.install.known_models import KNOWN
from mixchat.install.make.calibrator import dense_inputs_size
from mixchat.install.make.quantize_options import default_blueprint
from mixchat.loading import calibrate
from mixchat.weights.families.read_config import read_config


@pytest.fixture
def blueprint():
    """Qwen3's, whose head has 151,936 rows."""
    return default_blueprint(read_config(KNOWN["qwen3"].config), dense_bits=6)


@pytest.mark.parametrize(("free", "rows"), [(1000, 8 * 4096), (20, 8192), (0, 5 * 512)])
def test_inputs_of_attention_and_head_take_a_quarter_of_the_free_disk(
    blueprint, tmp_path, monkeypatch, free, rows
):
    """They took 20 GB, whatever the disk had, and a calibration was refused if it had less."""
    monkeypatch.setattr(calibrate.machine, "free_disk", lambda place: free * 10**9)
    found = calibrate._dense_rows(blueprint, tmp_path)
    assert found == pytest.approx(rows, abs=512)
    if free:
        assert dense_inputs_size(blueprint, found) <= free * 10**9 / 4


def test_a_large_head_takes_less_memory_than_two_copies_in_fp32(blueprint, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate.machine, "free_disk", lambda place: 10**12)
    found, head = calibrate._memory(blueprint, tmp_path, 5), blueprint.head
    assert 10**9 < found < 2 * 4 * head.rows * head.columns


def test_8_bits_are_not_calibrated(tmp_path):
    blueprint = default_blueprint(read_config(KNOWN["qwen3"].config), dense_bits=8)
    assert calibrate._dense_rows(blueprint, tmp_path) == 0
    assert calibrate._memory(blueprint, tmp_path, 5) < 10**9
