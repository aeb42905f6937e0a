"""A model of format 2 is verified, repaired and converted; it keeps its format if it can."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from care_tools import flip, mend, verify
from convert_tools import ALL_4BIT, DENSE, EIGHT, LAST, pack, reform, stop_at, text_of
from weight_tools import Meter, files_of

from mixchat.weights.format.manifest import CONVERSION_DIR, read_manifest


def as_format_2(directory: Path) -> None:
    """Rewrite the manifests as versions before format 3 wrote them."""
    for name in ("mixchat.json", "mixchat.copy.json"):
        document = json.loads((directory / name).read_text())
        how = document["quantization"]
        words = {part: how[part] != "none" for part in ("attention", "head")}
        document |= {"format": 2, "quantization": how | words}
        document.pop("sha256")
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
        (directory / name).write_text(json.dumps(document, indent=1) + "\n")


class TestOldFormat:
    @pytest.fixture(params=[DENSE, ALL_4BIT], ids=["16 bits", "4 bits"])
    def old(
        self,
        request: pytest.FixtureRequest,
        tiny_checkpoint: Path,
        install: Callable[..., Path],
        tmp_path: Path,
    ) -> Path:
        made = install(tiny_checkpoint, layout="bitsandbytes", **request.param)
        installed = Path(shutil.copytree(made, tmp_path / "models" / "mine"))
        as_format_2(installed)
        return installed

    def test_it_is_intact_and_answers(self, old: Path) -> None:
        assert verify(old) == []
        assert len(text_of(old)) == 20

    def test_it_is_repaired(self, old: Path, tiny_checkpoint: Path) -> None:
        before = files_of(old)
        flip(old / "mixchat.json", 100)
        flip(old / "shared.safetensors", -1)
        mend(old, tiny_checkpoint)
        assert files_of(old) == before

    def test_with_another_layout_it_keeps_its_format(self, old: Path) -> None:
        before = files_of(old)
        assert pack(old)
        assert json.loads((old / "mixchat.json").read_text())["format"] == 2
        assert verify(old) == []
        assert reform(old, "bitsandbytes")
        assert files_of(old) == before

    def test_a_conversion_that_an_earlier_version_began_is_finished(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pack(old)
        journal = old / CONVERSION_DIR / "journal.jsonl"
        _, *lines = journal.read_text().splitlines(keepends=True)
        head = json.dumps({"format": 2, "layout": "cpu-packed"}) + "\n"
        journal.write_text("".join([head, *lines]))
        assert verify(old) == []
        meter = Meter()
        assert reform(old, meter=meter)
        assert meter.bar("converting").first > 0
        assert verify(old) == []
        assert read_manifest(old).quantization["layout"] == "cpu-packed"
        assert json.loads((old / "mixchat.json").read_text())["format"] == 2


def test_a_model_of_the_old_format_gets_the_new_one_with_8_bits(
    dense: Path, tiny_checkpoint: Path, install: Callable[..., Path]
) -> None:
    as_format_2(dense)
    assert reform(dense, None, EIGHT)
    assert files_of(dense) == files_of(install(tiny_checkpoint, layout="bitsandbytes"))
