"""The installed model depends on the weights alone: not on shards, order, or interruptions."""

import os
import shutil
from itertools import permutations
from pathlib import Path

import pytest
from care_tools import flip
from patience import PATIENCE_S
from weight_tools import (
    fetching,
    files_of,
    leave_unfinished,
    order_of,
    quantize,
    run,
    shard,
    shard_names,
)

from mixchat.base.errors import MixchatError
from mixchat.install.make.build import Build
from mixchat.install.make.parts import model_parts
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.weights.format.workspace import MODEL_DIR, SPILL_PREFIX, workspace

EXPERT = "layers.0.block_sparse_moe.experts.1"


class TestShards:
    @pytest.mark.parametrize("order", list(permutations(["w1", "w2", "w3"])))
    def test_the_matrices_of_an_expert_come_in_any_order(self, small, whole, tmp_path, order):
        place = order_of([f"{EXPERT}.{name}" for name in order])
        opened = fetching(shard(small, tmp_path / "shards", place), tmp_path / "model")
        run(opened, tmp_path / "model")
        assert files_of(tmp_path / "model") == whole

    def test_layers_come_in_any_order(self, tiny_checkpoint, tmp_path):
        place = order_of(["lm_head", "layers.1.", "model.norm", "layers.0."])
        opened = fetching(shard(tiny_checkpoint, tmp_path / "shards", place), tmp_path / "model")
        run(opened, tmp_path / "model")
        quantize(tiny_checkpoint, tmp_path / "whole")
        assert files_of(tmp_path / "model") == files_of(tmp_path / "whole")

    @pytest.mark.parametrize(("ahead", "most"), [(True, 2), (False, 1)])
    def test_each_is_fetched_once_and_let_go_before_the_one_after_the_next_comes(
        self, small, tmp_path, ahead, most
    ):
        target = tmp_path / "model"
        opened = fetching(shard(small, tmp_path / "shards", 5), target)
        held: list[int] = []
        release = opened.release

        def released(name: str) -> None:
            held.append(len(list(opened.place.iterdir())))
            release(name)

        opened.release = released  # type: ignore[method-assign]
        run(opened, target, ahead=ahead)
        assert opened.fetched == opened.released == shard_names(5)
        assert max(held) <= most
        assert not opened.place.exists()

    def test_a_shard_that_is_not_what_its_header_said_is_refused(self, small, tmp_path):
        checkpoint = shard(small, tmp_path / "shards", 2)
        opened = fetching(checkpoint, tmp_path / "model")
        one, two = shard_names(2)
        shutil.copy(checkpoint / two, checkpoint / one)
        with pytest.raises(MixchatError, match="not the tensors"):
            run(opened, tmp_path / "model")


class TestResuming:
    def test_after_a_failure_at_each_part_nothing_is_made_twice_and_it_comes_to_an_end(
        self, small, whole, tmp_path, making, save_each_part
    ):
        checkpoint, target = shard(small, tmp_path / "shards", 3), tmp_path / "model"
        opened = fetching(checkpoint, target)
        every = list(model_parts(make_blueprint(opened.index, QuantizeOptions())))
        made: list[str] = []
        for number in range(len(every)):
            making.again(fail_at=1)
            if number + 1 < len(every):
                with pytest.raises(ConnectionError):
                    run(fetching(checkpoint, target), target)
            else:
                run(fetching(checkpoint, target), target)
            made += making.names
        assert sorted(made) == sorted(f"{part.file} {part.tensors[0].name}" for part in every)
        assert files_of(target) == whole

    @pytest.mark.parametrize("stop", range(5))
    def test_after_a_failure_at_any_shard_the_ones_before_are_not_needed_again(
        self, small, whole, tmp_path, stop
    ):
        checkpoint, target = shard(small, tmp_path / "shards", 5), tmp_path / "model"
        first, second = fetching(checkpoint, target), fetching(checkpoint, target)
        first.fail_at = shard_names(5)[stop]
        with pytest.raises(ConnectionError):
            run(first, target)
        run(second, target)
        assert first.fetched + second.fetched == shard_names(5)
        assert files_of(target) == whole

    def test_what_was_made_since_the_last_save_is_made_again(self, small, whole, tmp_path, making):
        making.fail_at = 7
        with pytest.raises(ConnectionError):
            quantize(small, tmp_path / "model")
        lost = set(making.names)
        making.again()
        quantize(small, tmp_path / "model")
        assert lost <= set(making.names)
        assert files_of(tmp_path / "model") == whole

    def test_the_bars_begin_where_they_stopped(self, small, tmp_path):
        checkpoint, target = shard(small, tmp_path / "shards", 3), tmp_path / "model"
        leave_unfinished(checkpoint, target)
        meter = run(fetching(checkpoint, target), target)
        for what in ("fetching org/repo", "quantizing"):
            bar = meter.bar(what)
            assert 0 < bar.first < bar.done == bar.total
            assert bar.closed

    def test_a_finished_part_that_only_waited_for_the_manifest_needs_no_shard(
        self, small, whole, tmp_path, making
    ):
        target = tmp_path / "model"
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(Build, "_finish")
            with pytest.raises(AttributeError):
                run(fetching(small, target), target)
        making.again()
        second = fetching(small, target)
        run(second, target)
        assert (making.names, second.fetched) == ([], [])
        assert files_of(target) == whole

    @pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 5_000)])
    def test_a_file_that_vanished_or_is_short_is_made_again_whatever_the_journal_says(
        self, small, whole, tmp_path, spoil
    ):
        """The journal was believed: the finished model had holes under the right hashes."""
        checkpoint, target = shard(small, tmp_path / "shards", 3), tmp_path / "model"
        leave_unfinished(checkpoint, target)
        for path in (workspace(target) / MODEL_DIR).glob("shared.safetensors"):
            spoil(path)
        run(fetching(checkpoint, target), target)
        assert files_of(target) == whole

    @pytest.mark.parametrize(
        "spoil",
        [Path.unlink, lambda path: path.write_bytes(b"junk"), lambda path: flip(path, -1)],
        ids=["gone", "junk", "a flipped byte"],
    )
    def test_what_was_spilled_and_is_lost_is_taken_from_its_shard_again(
        self, small, whole, tmp_path, spoil
    ):
        """Nothing could tell: the part was made of it, and hashed afterwards."""
        checkpoint, target = shard(small, tmp_path / "shards", 3), tmp_path / "model"
        leave_unfinished(checkpoint, target)
        spilled = list(workspace(target).glob(SPILL_PREFIX + "*"))
        assert spilled
        for path in spilled:
            spoil(path)
        again = fetching(checkpoint, target)
        run(again, target)
        assert len(again.fetched) > 1
        assert files_of(target) == whole


def test_a_shard_that_is_still_coming_does_not_keep_a_failed_build(two_shards, tmp_path, making):
    """The thread that waits for a silent hub is told to stop, and left where it does not hear."""
    opened = fetching(two_shards, tmp_path / "model")
    fetch = opened.fetch
    stops = []

    def stalled(name: str, task: object, stop: object) -> Path:
        if name == opened.index.shards[1]:
            stops.append(stop)
            assert stop.wait(PATIENCE_S)
        return fetch(name, task, stop)

    opened.fetch = stalled  # type: ignore[method-assign]
    making.fail_at = 1
    with pytest.raises(ConnectionError):
        run(opened, tmp_path / "model")
    assert stops[0].is_set()
