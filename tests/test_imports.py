"""Imports run in one direction: from what a person sees down to bytes, and never in a circle."""

import ast
import functools
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mixchat

PACKAGE = Path(mixchat.__file__).parent

# From the top down: a room imports only what stands below it.
ORDER = (
    "cli",
    "cli/flags",
    "cli/output",
    "bench",
    "serving",
    "serving/web",
    "serving/requests",
    "serving/client",
    "chat/terminal",
    "chat/saved",
    "chat/draw",
    "chat",
    "chat/tools",
    "chat/documents",
    "face",
    "text/form",
    "text",
    "loading",
    "planning",
    "install/care",
    "install/make",
    "install/source",
    "install",
    "engine",
    "engine/layers",
    "engine/caches",
    "experts/workers",
    "experts",
    "weights/format",
    "weights/matrix",
    "weights/families",
    "kernels/gpu",
    "kernels/cpu",
    "base",
)

# Chat and text ask the engine, and know nothing of what lies below it.
UNKNOWN_TO_CHAT_AND_TEXT = {"loading", "planning", "install", "experts", "weights", "kernels"}


def modules() -> dict[str, Path]:
    """Each module by its dotted name, packages' own `__init__` left out: they import nothing."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in files
    }


MODULES = modules()


def imported_by(path: Path) -> set[str]:
    """Every module of the package that a file imports: at its top, in a function, or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return each module's imports. Parsing them takes a second, which collecting shall not."""
    return {name: imported_by(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return MODULES[module].parent.relative_to(PACKAGE).as_posix()


def test_every_room_has_its_place_in_the_order():
    assert {room_of(module) for module in MODULES} == {*ORDER, "."}


def test_a_module_imports_only_from_its_own_room_and_those_below():
    for module in set(MODULES) - {"mixchat.__main__"}:
        below = ORDER[ORDER.index(room_of(module)) :]
        assert [other for other in imports()[module] if room_of(other) not in below] == [], module


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("top", ["chat", "text"])
def test_chat_and_text_import_nothing_below_the_engine(top):
    above = [module for module in MODULES if module.startswith(f"mixchat.{top}.")]
    reached = {other for module in above for other in imports()[module]}
    rooms = {room_of(other).split("/")[0] for other in reached}
    assert rooms.isdisjoint(UNKNOWN_TO_CHAT_AND_TEXT)


def test_an_import_against_the_order_or_in_a_circle_would_be_found(tmp_path):
    """The tests above read the code: what they read is shown here on code that breaks the rule."""
    file = tmp_path / "wrong.py"
    file.write_text("def late():\n    from mixchat.cli import app\n    import mixchat.cli.run\n")
    assert imported_by(file) == {"mixchat.cli.app", "mixchat.cli.run"}


def test_no_two_classes_have_one_name():
    """Fourteen names stood twice, such as two `MemoryBudget`."""
    names = [
        node.name.lstrip("_")
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    twice = {name for name, count in Counter(names).items() if count > 1}
    assert twice <= {"Norm"}  # an operation of a layer, and one in a kernel for GPUs
