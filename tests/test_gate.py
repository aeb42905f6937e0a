"""`.ci/run` with tests that fail once or always, and the packages that it installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
GATE = ROOT / ".ci/run"
# Each test fails as often as the file beside it says.
TESTS = """
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", {names})
def test_it(name):
    left = int(Path(name).read_text())
    Path(name).write_text(str(left - 1))
    assert left < 1
"""
# `python3 -m venv DIRECTORY` makes an environment of the programs beside this one.
VENV = """#!/bin/sh
mkdir -p "$3" && ln -s "$(dirname "$0")" "$3/bin"
"""
PYTEST = f"""#!/bin/sh
[ "$1" = -n3 ] && shift
exec {sys.executable} -m pytest -p no:xdist "$@"
"""
PROGRAMS = {"python3": VENV, "pytest": PYTEST, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}


def gate(tmp_path, failures, **programs):
    """Run `.ci/run` in a checkout whose tests fail as often as `failures` says."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(GATE, tmp_path / ".ci/run")
    for name, count in failures.items():
        (tmp_path / name).write_text(str(count))
    (tmp_path / "test_it.py").write_text(TESTS.format(names=list(failures)))
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    true = dict.fromkeys(["pip", "ruff", "mypy", "llvm-mca-22"], "#!/bin/sh\n")
    for name, text in {**true, **PROGRAMS, **programs}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    path = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
    return run(["bash", tmp_path / ".ci/run"], tmp_path, PATH=path)


def run(command, directory, **variables):
    """Run a command without what tells pytest that it is a test's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = {**kept, **variables}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_a_test_that_passes_the_second_time_is_named_at_the_end(tmp_path):
    done = gate(tmp_path, {"good": 0, "flaky": 1})
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "flaky: test_it.py::test_it[flaky]",
    )
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.parametrize(
    "failures",
    [{"good": 0, "broken": 2}, {"flaky": 1, "broken": 2}, {f"flaky{i}": 1 for i in range(6)}],
    ids=["a test fails twice", "one of two does", "six are flaky"],
)
def test_the_gate_is_closed_if(failures, tmp_path):
    done = gate(tmp_path, failures)
    assert done.returncode == 1
    assert "\nflaky: " not in done.stdout


def test_nothing_runs_again_if_no_test_ran(tmp_path):
    done = gate(tmp_path, {"flaky": 1}, ruff="#!/bin/sh\nexit 1\n")
    assert (done.returncode, done.stdout) == (1, "")


def test_tests_that_could_not_be_collected_are_not_flaky(tmp_path):
    (tmp_path / "test_other.py").write_text("import nothing_of_this_name\n")
    done = gate(tmp_path, {"flaky": 1})
    assert done.returncode == 2


def test_a_process_that_dies_is_not_a_flaky_test(tmp_path):
    """xdist counted one failure, although the dead process's other tests never ran."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text("import os\n\n\ndef test_it():\n    os._exit(1)\n")
    command = [sys.executable, "-m", "pytest", "-n1", "--max-worker-restart=0"]
    assert run(command, tmp_path).returncode == pytest.ExitCode.INTERNAL_ERROR


def test_every_package_of_pyproject_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / ".ci/lock.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        asked = Requirement(text)
        name = canonicalize_name(asked.name)
        versions = [str(pin.specifier)[2:] for pin in pins if canonicalize_name(pin.name) == name]
        assert versions or name == "pip", name  # pip comes with the environment
        assert all(map(asked.specifier.contains, versions)), (text, versions)
