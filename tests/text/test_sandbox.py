"""The sandbox: a checkpoint's tokenizer and template do no harm, whatever they try."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hostile_programs as hostile
import pytest
import text_builders as build
from patience import wait_until

from mixchat.base.errors import CheckpointError, PromptError
from mixchat.text.checkpoint_text import CheckpointText
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.detokenizer import Detokenizer
from mixchat.text.messages import Message

TALK = [
    Message("system", "Be brief. <|im_end|>"),
    Message("user", "Grüße, 🙂 <s>"),
    Message("assistant", "another text than that of the ids", (5, 6, 7)),
    Message("user", "So?"),
]
HARMLESS = "id of 4,294,967,295"
HOSTILE = [name for name in [*hostile.TEMPLATES, *hostile.TOKENIZERS] if name != HARMLESS]


@pytest.fixture
def sandboxed(checkpoints: dict[str, Path]) -> Iterator[CheckpointText]:
    with closing(CheckpointText(checkpoints["byte-level"])) as text:
        yield text


@pytest.fixture
def short_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixth of the time, so that an endless loop ends soon."""
    monkeypatch.setattr("mixchat.text.sandbox.cpu_seconds", lambda method, size: 0.5)


def process_of(text: CheckpointText) -> Any:
    child: Any = text._sandbox._child
    return child._process


def test_the_sandbox_answers_as_the_same_tokenizer_outside(directory):
    tokenizer = load_tokenizer(directory)
    template = load_template(directory, tokenizer)
    with closing(CheckpointText(directory)) as text:
        sandboxed, sandboxed_template = text.tokenizer(), text.template([77])
        for name in ("vocab_size", "bos_id", "eos_id", "adds_bos", "control_tokens"):
            assert getattr(sandboxed, name) == getattr(tokenizer, name)
        assert sandboxed_template.stop_ids == {*template.stop_ids, 77}
        assert sandboxed_template.continues_prompt == template.continues_prompt
        assert sandboxed_template.encode(TALK) == template.encode(TALK)
        ids = tokenizer.encode("Grüße, 🙂 <|im_end|>\n")
        assert sandboxed.encode("Grüße, 🙂 <|im_end|>\n") == ids
        inserts = {"A": "<|im_end|>", "B": (5, 6)}
        assert sandboxed.encode_template("<s>AxB", inserts) == tokenizer.encode_template(
            "<s>AxB", inserts
        )
        assert sandboxed.token_bytes == tokenizer.token_bytes
        assert sandboxed.decode([*ids, 10**9]) == tokenizer.decode([*ids, 10**9])
        streams = (Detokenizer(sandboxed.token_bytes), Detokenizer(tokenizer.token_bytes))
        assert [streams[0].add(i) for i in ids] == [streams[1].add(i) for i in ids]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("short_of_time")
def test_every_hostile_template_and_tokenizer_ends_in_one_line(name, tmp_path):
    """Without a sandbox: 3 to 5 GB, more than 40 s, signal 6 and a backtrace."""
    if name in hostile.TEMPLATES:
        hostile.template(tmp_path / "x", hostile.TEMPLATES[name])
    else:
        hostile.tokenizer(tmp_path / "x", name)
    with (
        closing(CheckpointText(tmp_path / "x")) as text,
        pytest.raises(CheckpointError) as caught,
    ):
        text.template().encode([Message("user", "a b")])
    assert str(caught.value).startswith(str(tmp_path / "x"))
    if name in hostile.TEMPLATES:
        assert re.search("the chat template|tokenizer_config.json: larger", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_with_a_huge_id_does_no_harm(tmp_path):
    hostile.tokenizer(tmp_path / "x", HARMLESS)
    with closing(CheckpointText(tmp_path / "x")) as text:
        assert text.tokenizer().encode("a b")


def test_a_template_may_become_hostile_later(tmp_path):
    """A chat loses only that turn: the next one has a new process."""
    source = "{% if messages | length > 1 %}{{ 'x'.ljust(10 ** 10) }}{% endif %}ok"
    hostile.template(tmp_path / "x", source)
    with closing(CheckpointText(tmp_path / "x")) as text:
        template = text.template()
        good = template.encode([Message("user", "a")])
        answered = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        with pytest.raises(CheckpointError, match=r"more than (1 GB of memory|2 s)"):
            template.encode(answered)
        assert template.encode([Message("user", "a")]) == good


def test_a_child_that_ends_is_replaced(sandboxed):
    tokenizer = sandboxed.tokenizer()
    ids = tokenizer.encode("Hello")
    process_of(sandboxed).kill()
    with pytest.raises(CheckpointError, match=r"the tokenizer ends .*\(signal 9\)"):
        tokenizer.encode("Hello")
    assert tokenizer.encode("Hello") == ids


def test_after_ctrl_c_no_reply_is_taken_for_another_calls(sandboxed, monkeypatch):
    tokenizer = sandboxed.tokenizer()
    expected = tokenizer.encode("two")

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mixchat.text.sandbox.receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode("one")
    assert tokenizer.encode("two") == expected


def test_a_child_that_waits_is_ended(sandboxed, monkeypatch):
    """It computes nothing, so its limit of CPU time does not end it."""
    tokenizer = sandboxed.tokenizer()
    process_of(sandboxed).send_signal(signal.SIGSTOP)
    monkeypatch.setattr("mixchat.text.sandbox.reply_seconds", lambda seconds: 0.1)
    with pytest.raises(CheckpointError, match="gives no answer"):
        tokenizer.encode("Hello")


@pytest.mark.parametrize(
    "reply",
    [
        b"\xff\xff\xff\xff",
        b"\x03\x00\x00\x00{{{",
        b"\x02\x00\x00\x00[]",
        b"\x0e\x00\x00\x00" + b'{"value":[-1]}',
        b"\x0d\x00\x00\x00" + b'{"value":"x"}',
        b"\x40\x0d\x03\x00" + b"[" * 200_000,
    ],
)
def test_a_child_may_send_anything(reply, sandboxed, monkeypatch):
    """A program that breaks the tokenizer can write anything into the socket."""
    import socket

    tokenizer = sandboxed.tokenizer()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(reply)
        monkeypatch.setattr(sandboxed._sandbox._child, "_channel", ours)
        with pytest.raises(CheckpointError, match="an answer that cannot be used"):
            tokenizer.encode("Hello")


def test_the_child_ends_with_its_parent(checkpoints):
    """Also if the parent is killed."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mixchat.text.checkpoint_text import CheckpointText\n"
        "text = CheckpointText(Path(sys.argv[1]))\n"
        "text.tokenizer()\n"
        "print(text._sandbox._child._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(checkpoints["byte-level"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_child_inherits_nothing_of_its_parent(sandboxed):
    sandboxed.tokenizer()
    process = Path(f"/proc/{process_of(sandboxed).pid}")
    assert {path.name for path in (process / "fd").iterdir()} == {"0", "1", "2"}
    assert os.getsid(process_of(sandboxed).pid) == process_of(sandboxed).pid, "Ctrl-C reaches it"
    limits = (process / "limits").read_text()
    for line in ("Max address space         1000000000", "Max core file size        0"):
        assert line in limits
    loaded = (process / "maps").read_text()
    assert "tokenizers" in loaded
    assert "libtorch" not in loaded


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_child_gets_no_keys_and_tokens(checkpoints, monkeypatch):
    """A tokenizer or template that breaks out of its library found them in its environment."""
    for name in ("HF_TOKEN", "MIXCHAT_API_KEY", "AWS_SECRET_ACCESS_KEY", "ANYTHING"):
        monkeypatch.setenv(name, "secret")
    with closing(CheckpointText(checkpoints["byte-level"])) as text:
        assert text.tokenizer().vocab_size
        environ = Path(f"/proc/{process_of(text).pid}/environ").read_bytes()
    assert b"RAYON_NUM_THREADS=1" in environ
    assert b"secret" not in environ


def test_modules_in_the_current_directory_are_not_imported(checkpoints, tmp_path, monkeypatch):
    for name in ("jinja2", "tokenizers", "mixchat", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from here')")
    monkeypatch.chdir(tmp_path)
    with closing(CheckpointText(checkpoints["byte-level"])) as text:
        assert text.tokenizer().vocab_size


def test_a_text_longer_than_all_contexts_is_a_prompt_error(sandboxed):
    with pytest.raises(PromptError, match=r"too long for a tokenizer: 4\.0 MB"):
        sandboxed.tokenizer().encode("x" * 4_000_000)


def test_a_refusal_and_a_lone_surrogate_are_prompt_errors(tmp_path):
    source = "{{ messages[0].content }}{% if messages | length > 1 %}{{ raise_exception('No') }}"
    hostile.template(tmp_path / "x", source + "{% endif %}")
    with closing(CheckpointText(tmp_path / "x")) as text:
        with pytest.raises(PromptError, match=r"refuses the conversation: No$"):
            text.template().encode(TALK)
        with pytest.raises(PromptError, match="lone surrogate"):
            text.template().encode([Message("user", "a\udc80")])


def test_a_large_vocabulary_loads(tmp_path):
    """As many pieces as Llama 3 has, 128,000."""
    build.write_checkpoint(tmp_path, large_vocabulary(128_000), template=build.CHATML)
    with closing(CheckpointText(tmp_path)) as text:
        sandboxed = text.tokenizer()
        assert sandboxed.vocab_size >= 128_000
        assert sandboxed.decode(sandboxed.encode("Hello, world")) == "Hello, world"


def large_vocabulary(size: int) -> Any:
    """Return a byte-level BPE in which each piece is an earlier one and a byte more."""
    from itertools import product

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(alphabet, alphabet))
    merges = [*pairs, *((a + b, c) for (a, b), c in product(pairs, alphabet[60:62]))]
    merges = merges[: size - len(alphabet)]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer
