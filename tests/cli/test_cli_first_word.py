"""`mixchat run demo hi`, as other tools have it: the model goes behind -m here."""

import pytest


@pytest.fixture
def installed(tmp_path):
    """A model on this machine, as far as its directory tells."""
    for name in ("org--name", "mine"):
        (tmp_path / "home" / "models" / f".{name}.mixchat.unfinished").mkdir(parents=True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["demo", "base", "org/name", "mine"])
def test_a_models_name_as_the_first_word_is_no_prompt(mixchat, name):
    """It was asked of the default model, or ended with an error about that one."""
    done = mixchat("run", name, "hi", "you there")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [
        f"error: {name} is the name of a model; did you mean -m {name}?",
        f"hint: Run: mixchat run -m {name} hi 'you there' (or, to ask just that: "
        f"mixchat run -- {name} hi 'you there')",
    ]


def test_a_models_name_alone_is_no_prompt_either(mixchat):
    done = mixchat("run", "demo")
    assert done.returncode == 2
    assert b"hint: Run: mixchat run -m demo (or" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["demo hi"], "demo hi"),
        (["--", "demo", "hi"], "demo hi"),
        (["-m", "base", "demo", "hi"], "demo hi"),
        (["hi", "demo"], "hi demo"),
        (["org/other", "hi"], "org/other hi"),
        (["models", "hi"], "models hi"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_anything_else_is_asked(mixchat, tmp_path, monkeypatch, arguments, prompt):
    monkeypatch.chdir(tmp_path / "home")  # where a directory `models` is, which is no model
    done = mixchat("run", *arguments, PROMPTS=tmp_path / "prompts")
    assert (done.stderr, done.returncode) == (b"", 0)
    assert (tmp_path / "prompts").read_text() == f"[user]{prompt}\n---\n"


def test_a_directory_that_is_a_model_counts(mixchat, tiny_model):
    done = mixchat("run", str(tiny_model), "hi")
    assert done.returncode == 2
    assert f"did you mean -m {tiny_model}?" in done.stderr.decode()


@pytest.mark.parametrize(("name", "size"), [("instruct", 93), ("gpt-oss", 14)])
def test_a_fresh_machine_is_told_what_mixtral_takes_and_what_else_there_is(mixchat, name, size):
    """Before 93 GB are fetched, somebody should hear of that, of `plan`, and of the demo."""
    done = mixchat("run", "-m", name, "hi", fake=False)
    assert done.returncode == 4
    hint = done.stderr.decode().splitlines()[1]
    for said in (f"mixchat download {name} ({size} GB)", f"mixchat plan {name}", "run -m demo"):
        assert said in hint
