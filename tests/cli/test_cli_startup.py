"""`--help` and `--version` answer at once, because nothing heavy is imported for them."""

import subprocess
import sys

import pytest
from command_line import loaded_by
from patience import PATIENCE_S

HEAVY = {
    "bitsandbytes",
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "numpy",
    "prompt_toolkit",
    "psutil",
    "rich",
    "sentencepiece",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
}


@pytest.mark.parametrize("arguments", [["--version"], ["run", "--help"], ["serve", "-h"], []])
def test_help_imports_nothing_heavy(arguments, environment):
    code, output, loaded = loaded_by(environment, *arguments)
    assert (code, bool(output)) == (0, True)
    assert not HEAVY & loaded


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list"], 0),
        (["run", "Hi", "-m", "nonsense"], 4),
        (["show", "x"], 4),
        (["config"], 0),
    ],
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments, code, environment):
    found, _, loaded = loaded_by(environment, *arguments)
    assert found == code
    assert not {"torch", "bitsandbytes", "huggingface_hub", "numpy", "httpcore2"} & loaded


def test_help_imports_few_modules():
    """It takes a tenth of a second, of which nearly all goes into imports; the time itself depends
    on what else the machine does."""
    code = (
        "import sys\n"
        "from mixchat.cli.app import run\n"
        "try:\n run(['--help'])\n"
        "finally:\n print(len(sys.modules), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert int(done.stderr) < 265  # 251 of them, of which Typer brings 110


def test_ctrl_c_ends_it_quietly_before_anything_else_is_imported():
    """The import of `signal` came first: Ctrl-C in its milliseconds printed a traceback."""
    code = (
        "import _signal, sys\n"
        "seen = {}\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        seen[name] = _signal.getsignal(_signal.SIGINT)\n"
        "_signal.signal(_signal.SIGINT, _signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "for name in ('__future__', 'signal', 'enum', 're'):\n"
        "    sys.modules.pop(name, None)\n"
        "import mixchat.__main__\n"
        "from mixchat.base import interrupts\n"
        "del seen['mixchat'], seen['mixchat.__main__']\n"
        "seen = {name: handler == _signal.SIG_DFL for name, handler in seen.items()}\n"
        "assert seen['signal'] and all(seen.values()), seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
