"""Bad input: one line on stderr, nothing on stdout, and the exit code of errors.py."""

import errno
import os
import pty
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from command_line import FAKE
from patience import PATIENCE_S
from tiny_tokenizer import write_tokenizer

from mixchat.base.errors import CheckpointError


def lines_of(done):
    assert done.stdout == b""
    return done.stderr.decode().splitlines()


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["Hi", "--stop", ""], b"", 2, "--stop: a text is empty"),
        (["Hi", "--stop", b"caf\xe9"], b"", 2, "--stop: 'caf\\udce9' is not UTF-8"),
        (["Hi", "--worker", "a:0"], b"", 2, "--worker: 'a:0': a port is between 1 and 65535"),
        ([], b"", 3, "standard input is empty"),
        ([], "\ufeff".encode(), 3, "standard input is empty"),
        ([""], b"", 3, "the prompt is empty"),
        ([], b"caf\xe9 noir", 3, "standard input is not UTF-8: the byte 0xe9 at offset 3"),
        ([], b"\x7fELF\0", 3, "standard input is not text: it contains a NUL byte at offset 4"),
        ([b"h\xc3\xa9\xff"], b"", 3, "the prompt is not UTF-8: the byte 0xff at offset 3"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(mixchat, arguments, stdin, code, message):
    done = mixchat("run", *arguments, stdin=stdin)
    assert lines_of(done)[0].startswith(f"error: {message}")
    assert done.returncode == code


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("UsageError", 2),
        ("PromptError", 3),
        ("ModelNotFoundError", 4),
        ("HubError", 5),
        ("ServerError", 5),
        ("CheckpointError", 6),
        ("ResourceError", 7),
        ("MissingDependencyError", 8),
    ],
)
def test_each_error_has_its_exit_code(mixchat, kind, code):
    done = mixchat("run", "Hi", SCRIPT=f'[[{{"raise": "{kind}", "with": "[red]so[/] it is"}}]]')
    assert (lines_of(done), done.returncode) == (["error: [red]so[/] it is"], code)


def numpy_s_error():
    error = ImportError("Error importing numpy: you should not try to import numpy from here")
    error.__cause__ = ImportError("libblas.so: failed to map segment from shared object")
    return error


def open_files_error(wrapped):
    from mixchat.base.files import reading

    with pytest.raises((CheckpointError, OSError)) as caught:  # noqa: SIM117
        with reading(Path("experts-031.safetensors")) if wrapped else nullcontext():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return caught.value


OF_GPU = "hint: Try a smaller --ctx-size or --device-memory."
BY_ULIMIT = "hint: A limit on this process allows no more (ulimit -v): raise it."
# Under `ulimit -v` most of those without memory ended as "internal error", and the hint named
# experts. A limit of open files was taken for a damaged model, with exit code 6.
LACKS = {
    "a GPU's memory": (type("OutOfMemoryError", (MemoryError,), {})("CUDA"), 7, OF_GPU),
    "a GPU's, as torch's error": (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 7, OF_GPU),
    "ENOMEM": (OSError(errno.ENOMEM, "Cannot allocate memory"), 7, BY_ULIMIT),
    "torch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 7, BY_ULIMIT),
    "C++'s memory": (RuntimeError("std::bad_alloc"), 7, BY_ULIMIT),
    "the loader's memory": (ImportError("libtorch_cpu.so: cannot allocate memory"), 7, BY_ULIMIT),
    "numpy's cause": (numpy_s_error(), 7, BY_ULIMIT),
    "open files": (open_files_error(wrapped=False), 7, "ulimit -n"),
    "open files of a model": (open_files_error(wrapped=True), 7, "ulimit -n"),
    "static TLS": (
        ImportError("libgomp.so: cannot allocate memory in static TLS block"),
        1,
        "internal error",
    ),
    "other": (RuntimeError("Expected all tensors to be on the same device"), 1, "internal error"),
}


@pytest.mark.parametrize(("error", "code", "said"), LACKS.values(), ids=LACKS)
def test_a_lack_of_memory_or_of_files_is_told_from_other_faults(
    capsys, monkeypatch, error, code, said
):
    from mixchat.cli.output import messages

    monkeypatch.setattr(messages, "memory_left_by_ulimit", lambda: {"ulimit -v": 5})
    assert messages.print_error(error) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert ("error: there is not enough memory\n" in printed) == said.startswith("hint: ")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what is taken")
@pytest.mark.parametrize("command", ["plan", "verify demo"])
def test_too_small_a_ulimit_is_refused_before_torch_aborts_the_process(environment, command):
    limited = f"ulimit -v 600000; exec {sys.executable} -m mixchat {command}"
    place = Path(environment["MIXCHAT_HOME"]) / "models" / "demo"
    place.mkdir(parents=True)
    (place / "mixchat.json").touch()
    done = subprocess.run(
        ["sh", "-c", limited], capture_output=True, env=environment, timeout=PATIENCE_S, check=False
    )
    lines = lines_of(done)
    assert (done.returncode, len(lines)) == (7, 2)
    assert "ulimit -v leaves" in lines[0]


def test_an_error_of_ours_is_one_line_and_shows_its_traceback_on_demand(mixchat):
    script = '[[{"raise": "ZeroDivisionError", "with": "two\\nlines \\u001b[2J"}]]'
    done = mixchat("run", "Hi", SCRIPT=script)
    assert lines_of(done) == [
        "error: internal error: ZeroDivisionError: two lines [2J",
        "hint: Run it again with MIXCHAT_DEBUG=1 to see the traceback.",
    ]
    assert done.returncode == 1
    again = mixchat("run", "Hi", SCRIPT=script, MIXCHAT_DEBUG=1)
    assert again.returncode == 1
    assert "Traceback" in again.stderr.decode()
    for off in ("0", "", "false", "off"):
        assert mixchat("run", "Hi", SCRIPT=script, MIXCHAT_DEBUG=off).stderr == done.stderr


def test_a_model_of_more_layers_than_open_files_names_the_limit(
    environment, make_checkpoint, install
):
    deep = install(write_tokenizer(make_checkpoint(num_hidden_layers=24, vocab_size=262)))
    run = f"{sys.executable} -m mixchat run -m {deep} -n 1 --device cpu Hi </dev/null"
    for limit, code in (("-n 20", 7), ("-Sn 20", 0)):  # a soft limit is raised
        command = ["sh", "-c", f"ulimit {limit}; exec {run}"]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE_S)
        assert done.returncode == code, done.stderr
        assert (b"ulimit -n" in done.stderr) == bool(code)


@pytest.mark.parametrize("command", ["plan", "run -n 1 --device cpu Hi"])
def test_a_cpu_without_kernels_is_refused_in_one_line(
    mixchat, make_checkpoint, install, monkeypatch, command
):
    """Such a CPU computed with torch, at a small share of the speed."""
    monkeypatch.setattr("mixchat.kernels.cpu.compile.instruction_set", lambda: None)
    monkeypatch.setattr("mixchat.kernels.cpu.compile.has_feature", lambda name: False)
    model = install(write_tokenizer(make_checkpoint(vocab_size=262)))
    name, *flags = command.split()
    done = mixchat(name, *flags, *(["-m"] if name == "run" else []), str(model), fake=False)
    assert done.returncode == 8
    error, hint = lines_of(done)
    assert error.startswith("error: this CPU has no ")
    assert hint.startswith("hint: Use another machine.")


@pytest.mark.parametrize("command", ["list", "run -m demo Hi"])
def test_a_deleted_working_directory_is_named(environment, tmp_path, command):
    """A library of torch ended the process with a fatal error of its own."""
    deleted = f"mkdir gone && cd gone && rmdir ../gone; exec {sys.executable} -m mixchat {command}"
    done = subprocess.run(
        ["sh", "-c", deleted],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    error, hint = lines_of(done)
    assert error == "error: the working directory was deleted"
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("command", "model"),
    [
        (["run", "Hi", "-m"], "instruct"),
        (["show"], "a\nb\x1b[2J"),
        (["rm", "-y"], "../escape"),
        (["repair"], "[red]x[/]"),
        (["verify"], "nonsense"),
    ],
)
def test_a_model_that_is_not_there(mixchat, command, model):
    done = mixchat(*command, model, fake=False)
    lines = lines_of(done)
    assert done.returncode == 4
    assert len(lines) == 2
    assert "\x1b" not in lines[0]


def test_values_are_checked_before_stdin_and_the_model(mixchat):
    assert (
        mixchat("run", "-m", "nonsense", "--temp", "-1", stdin=b"\xff", fake=False).returncode == 2
    )


def test_a_chat_needs_a_terminal_on_both_sides(environment):
    """With a terminal to read from and a file to write to there is nobody to show a prompt to."""
    master, slave = pty.openpty()
    done = subprocess.run(
        [*FAKE, "run"],
        stdin=slave,
        capture_output=True,
        env=environment,
        timeout=PATIENCE_S,
        check=False,
    )
    os.close(master)
    os.close(slave)
    assert done.returncode == 2
    assert lines_of(done)[0] == "error: a chat needs a terminal to write to"


@pytest.mark.parametrize(
    ("ending", "swallowed", "exit_code"),
    [
        ("raise KeyboardInterrupt", "raise RuntimeError('cannot be imported')", 130),
        ("os.kill(os.getpid(), signal.SIGTERM), time.sleep(50)", "return 0", 143),
    ],
)
def test_a_signal_ends_a_command_whatever_a_library_makes_of_it(
    environment, ending, swallowed, exit_code
):
    """Some libraries turn what ends them into an error of their own: "internal error", exit 1."""
    code = (
        "import os, signal, time\n"
        "from mixchat.cli import app\n"
        "def work(arguments):\n"
        "    try:\n"
        f"        {ending}\n"
        "    except BaseException:\n"
        f"        {swallowed}\n"
        "app._invoke = work\n"
        "app.run([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, b"", b"")
