"""The plan of a download, compared with what the download takes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_hub import REPO, FakeHub
from patience import PATIENCE_S
from weight_tools import Fetching, order_of, shard

from mixchat.base import machine
from mixchat.base.errors import ResourceError
from mixchat.base.machine import disk_usage
from mixchat.base.safetensors import Header, TensorSpec
from mixchat.install.known_models import KNOWN
from mixchat.install.make import download_plan
from mixchat.install.make.download_plan import DownloadPlan, ShardBytes, find_memory_need, make_plan
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.needs import Need, add_up_needs
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.make.unfinished import Spill
from mixchat.install.source import hub
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.source.checkpoint_index import CheckpointIndex, expected_index
from mixchat.install.source.hub_checkpoint import HubCheckpoint
from mixchat.weights.families.read_config import FAMILIES, read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.manifest import Source, read_manifest
from mixchat.weights.format.workspace import SOURCE_DIR, workspace

MB = 1_000_000
MXFP4 = "gpt_oss in mxfp4"
FORMS: list[dict[str, Any]] = [
    {},
    *({"attention": bits, "head": bits} for bits in (16, 6)),
    {"attention": 4, "head": 4},
    *({"quant_type": kind} for kind in ("trellis3", "trellis2", "none")),
    {"quant_type": "none", "attention": 8},
]
PLACES = {
    "one after another": order_of(["embed", "layers.0", "layers.1", "layers.2"]),
    "dealt out": 4,
    "an expert in the first and the last": order_of(
        ["layers.0.block_sparse_moe.experts.0.w1", "layers.1.", "layers.0", "layers.2", "embed"]
    ),
    "much in the last": order_of(["norm", "self_attn"]),
    "one": 1,
}


@pytest.fixture(scope="module")
def large(make_checkpoint: Callable[..., Path]) -> Path:
    """Large enough, 30 MB, for pages and headers not to matter."""
    return make_checkpoint(hidden_size=256, intermediate_size=512, num_hidden_layers=3)


class TestDisk:
    @pytest.mark.parametrize("ahead", [True, False])
    @pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
    def test_the_peak_is_what_is_measured(self, large, tmp_path, monkeypatch, place, ahead):
        monkeypatch.setattr(download_plan, "SMALL_FILES_BYTES", 0)
        target = tmp_path / "model"
        source = workspace(target) / SOURCE_DIR
        checkpoint = shard(large, tmp_path / "shards", place)
        opened = Fetching(checkpoint, source)
        blueprint = make_blueprint(opened.index, QuantizeOptions())
        shards = ShardBytes.of(opened.index, blueprint, opened.temporary)
        most, peak = [0], shards.peak(ahead=ahead)
        drop = Spill.keep_only

        def measure(spill: Spill, names: set[str]) -> None:
            """At its fullest: a shard is quantized and still there, the next one has come."""
            coming = [opened.arrived[name] for name in opened.index.shards[: len(most) + ahead]]
            assert all(event.wait(PATIENCE_S) for event in coming)
            most.append(disk_usage(workspace(target)))
            drop(spill, names)

        monkeypatch.setattr(Spill, "keep_only", measure)
        build = CheckpointBuild(opened, target, blueprint)
        build.ahead = ahead
        build.run()
        assert 0.99 * peak < max(most) < 1.01 * peak

    @pytest.mark.parametrize("family", [*FAMILIES, MXFP4])
    def test_a_finished_models_size_is_known_beforehand(self, family, make_checkpoint, install):
        """By the headers of the checkpoint, and by its config.json alone."""
        how = {"model_type": "gpt_oss", "stored_as": "mxfp4"}
        if family != MXFP4:
            how = {"model_type": family, "stored_as": "bfloat16"}
        checkpoint = make_checkpoint(**how, hidden_size=128, intermediate_size=128, head_dim=32)
        index = DirectoryCheckpoint(checkpoint, Source("x")).index
        config_alone = expected_index(index.config, "x", mxfp4=family == MXFP4)
        for options in FORMS[:4] if family == MXFP4 else FORMS:
            installed = install(checkpoint, **options)
            sizes = {
                name: (installed / name).stat().st_size for name in read_manifest(installed).weights
            }
            for known in (index, config_alone):
                planned = make_blueprint(known, QuantizeOptions(**options))
                headers = planned.headers()
                assert {name: header.size for name, header in headers.items()} == sizes, options
                assert planned.size == sum(sizes.values())

    def test_a_shard_that_takes_no_room_is_not_counted(self, large, tmp_path):
        opened = DirectoryCheckpoint(shard(large, tmp_path / "shards", PLACES["one"]), Source("x"))
        blueprint = make_blueprint(opened.index, QuantizeOptions())
        peak = ShardBytes.of(opened.index, blueprint, opened.temporary).peak(ahead=True)
        assert 0 <= peak - blueprint.size - download_plan.SMALL_FILES_BYTES + 5 * 4096 < MB

    def test_places_on_one_disk_are_added_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "free_disk", lambda place: 7 if "one" in str(place) else 9)
        one, other = tmp_path / "one", tmp_path / "other"
        assert add_up_needs((one, 5), (other, 6)) == (Need(one, 11, 7),)

    def test_places_on_different_disks_are_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "free_disk", lambda place: 7 if "one" in str(place) else 9)
        monkeypatch.setattr(machine, "same_disk", lambda a, b: a.parent == b.parent)
        one, other = tmp_path / "a" / "one", tmp_path / "b" / "other"
        third = tmp_path / "a" / "third"
        assert add_up_needs((one, 5), (other, 6), (third, 1)) == (
            Need(one, 6, 7),
            Need(other, 6, 9),
        )


class TestMemory:
    def test_the_largest_matrix_decides(self, large, tiny_checkpoint):
        sizes = []
        for checkpoint in (large, tiny_checkpoint):
            index = DirectoryCheckpoint(checkpoint, Source("x")).index
            sizes.append(find_memory_need(index, make_blueprint(index, QuantizeOptions())).needed)
        matrices = 3 * 512 * 256 * 4
        assert 0 < sizes[0] - sizes[1] < 2 * matrices

    def test_layers_and_experts_do_not_count(self, make_checkpoint, tiny_checkpoint):
        more = make_checkpoint(num_hidden_layers=5, num_local_experts=8)
        needed = {
            find_memory_need(index, make_blueprint(index, QuantizeOptions())).needed
            for index in (
                DirectoryCheckpoint(path, Source("x")).index for path in (more, tiny_checkpoint)
            )
        }
        assert len(needed) == 1


class TestPlan:
    def made(self, fake: FakeHub, target: Path, cache: Path | None = None) -> DownloadPlan:
        remote = hub.look_up(REPO)
        keep = cache is not None
        place = workspace(target)
        opened = HubCheckpoint(remote, Source(REPO, remote.commit), place, keep_source=keep)
        blueprint = make_blueprint(opened.index, QuantizeOptions())
        build = CheckpointBuild(opened, target, blueprint)
        return download_plan.estimate_time(make_plan(build), build, keep=False)

    def test_of_a_hub_says_what_will_come_and_what_it_becomes(self, fake, tmp_path):
        made = self.made(fake, tmp_path / "target")
        shards = sum(len(data) for name, data in fake.files.items() if "safetensors" in name[-11:])
        assert made.checkpoint == made.fetch == shards
        assert (made.name, made.source, made.commit) == ("target", REPO, fake.commit)
        assert 0 < made.installed < shards
        (need,) = made.disk
        assert need.needed > made.installed
        assert made.rate is not None
        assert made.seconds is not None
        assert made.seconds >= made.fetch / made.rate

    def test_what_is_there_already_is_not_needed_again(self, fake, tmp_path):
        target = tmp_path / "target"
        before = self.made(fake, target)
        source = workspace(target) / SOURCE_DIR
        source.mkdir(parents=True)
        name = "model-00001-of-00002.safetensors"
        (source / name).write_bytes(fake.files[name])
        after = self.made(fake, target)
        assert before.fetch - after.fetch == len(fake.files[name])
        assert before.checkpoint == after.checkpoint
        saved = before.disk[0].needed - after.disk[0].needed
        assert saved == disk_usage(workspace(target))

    def test_without_room_for_two_shards_one_comes_after_the_other(
        self, fake, tmp_path, monkeypatch
    ):
        roomy = self.made(fake, tmp_path / "target")
        assert roomy.ahead
        tight = roomy.disk[0].needed - 1
        monkeypatch.setattr(machine, "free_disk", lambda place: tight)
        made = self.made(fake, tmp_path / "target")
        assert not made.ahead
        assert made.disk[0].needed <= tight
        assert made.fits
        made.check()

    def test_of_a_directory_fetches_nothing(self, two_shards, tmp_path):
        opened = DirectoryCheckpoint(two_shards, Source(str(two_shards)))
        blueprint = make_blueprint(opened.index, QuantizeOptions())
        build = CheckpointBuild(opened, tmp_path / "target", blueprint)
        made = download_plan.estimate_time(make_plan(build), build, keep=False)
        assert (made.fetch, made.rate, made.commit) == (0, None, None)
        assert made.seconds is not None

    def test_quantizing_time_grows_with_the_model(self, large, monkeypatch):
        index = DirectoryCheckpoint(large, Source("x")).index
        blueprint = make_blueprint(index, QuantizeOptions())
        clock = iter([5.0, 5.5])  # half a second for the sample
        with monkeypatch.context() as patched:
            patched.setattr(download_plan.time, "perf_counter", lambda: next(clock))
            seconds = download_plan._quantizing_seconds(index, blueprint)
        assert seconds == 12 * 3 * 512 * 256 / (math.prod(download_plan._SAMPLE_SHAPE) / 0.5)
        monkeypatch.setattr(download_plan, "_WEIGHTS_A_SECOND_MAX", 1.0)
        assert download_plan._quantizing_seconds(index, blueprint) == 12 * 3 * 512 * 256


ENOUGH = DownloadPlan(
    name="tiny",
    blueprint=Blueprint(read_config(KNOWN["instruct"].config), Quantization("nf4")),
    target=Path("/models/tiny"),
    source="org/tiny",
    commit=None,
    quantization={},
    checkpoint=1,
    fetch=1,
    installed=1,
    disk=(Need(Path("/models/tiny"), 5_000_000_000, 5_000_000_000),),
    memory=Need(Path(), 1_000_000_000, 1_000_000_000),
)


class TestCheck:
    def test_what_fits_to_the_byte_fits(self):
        ENOUGH.check()

    def test_too_little_disk_is_refused_with_both_numbers(self):
        """Rounded up: whoever frees what is written has freed enough."""
        second = Need(Path("/cache"), 7_010_000_000, 1_500_000_000)
        with pytest.raises(ResourceError) as caught:
            replace(ENOUGH, disk=(*ENOUGH.disk, second)).check()
        assert str(caught.value) == "not enough disk in /cache: 7.1 GB needed, 1.5 GB free"
        assert "MIXCHAT_HOME" in (caught.value.hint or "")
        assert "HF_HOME" in (caught.value.hint or "")

    def test_too_little_memory_is_refused_with_both_numbers(self):
        with pytest.raises(ResourceError, match=r"^not enough memory: 1\.3 GB needed, 1 GB free$"):
            replace(ENOUGH, memory=Need(Path(), 1_210_000_000, 1_000_000_000)).check()


def test_gpt_oss_is_foreseen_in_mxfp4():
    """Its index on the hub says `total_size` 13761264768. In bf16 it would be 41.8 GB."""
    config = read_config(KNOWN["gpt-oss"].config)
    assert KNOWN["gpt-oss"].fetched_bytes == 13_761_264_768
    for mxfp4, size, quant_type in ((True, 13.8, "mxfp4"), (False, 41.8, "nf4")):
        index = expected_index(config, "x", mxfp4=mxfp4)
        assert round(index.size / 1e9, 1) == size
        assert make_blueprint(index, QuantizeOptions()).quantization.quant_type == quant_type


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("name", ["instruct", "gpt-oss", "granite"])
def test_the_disk_of_a_download_is_foreseen_before_its_shards_are_known(name, ahead):
    """`plan` listed 73,000 tensors of Qwen3-Coder-Next for it, in 4 s."""
    known = KNOWN[name]
    whole = expected_index(
        read_config(known.config), name, mxfp4=known.experts_quant_type == "mxfp4"
    )
    shards: list[list[TensorSpec]] = [[]]
    for spec in whole.header(name).specs:
        if sum(own.nbytes for own in (*shards[-1], spec)) > 5e9:
            shards.append([])
        shards[-1].append(spec)
    headers = {f"{n:02}": Header.of(specs, name) for n, specs in enumerate(shards)}
    index = CheckpointIndex(whole.config, headers, None, name)
    blueprint = make_blueprint(index, QuantizeOptions())
    exact = ShardBytes.of(index, blueprint, lambda shard: index.header(shard).size)
    foreseen = ShardBytes.foreseen(known.fetched_bytes, blueprint.weights_size)
    assert foreseen.peak(ahead=ahead) == pytest.approx(exact.peak(ahead=ahead), rel=0.02)
