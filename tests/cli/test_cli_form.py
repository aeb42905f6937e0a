"""`mixchat run --schema` and `--grammar`: answers of a form, and what is refused before loading."""

import json

import pytest
from tiny_tokenizer import write_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["color", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def installed(make_checkpoint, install):
    """A model whose random weights would never give JSON."""
    return install(write_tokenizer(make_checkpoint(vocab_size=262, max_position_embeddings=512)))


@pytest.fixture
def ask(mixchat, installed, tmp_path):
    """Runs `mixchat run -m tiny ARGS` with the model itself."""
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    (models / "tiny").symlink_to(installed)
    return lambda *arguments, **how: mixchat(
        "run", "-m", "tiny", "--device", "cpu", "--temp", "1", *arguments, fake=False, **how
    )


def test_an_answer_is_json_by_the_schema(ask, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    for given in (json.dumps(SCHEMA), str(tmp_path / "s.json")):
        done = ask("--schema", given, "--seed", "1", "Hi")
        assert (done.returncode, done.stderr) == (0, b"")
        answer = json.loads(done.stdout)
        assert answer["color"] in ("red", "blue")
        assert answer["size"] <= 99


def test_with_json_the_answer_is_a_string_that_holds_json(ask):
    done = ask("--json", "--schema", json.dumps(SCHEMA), "Hi")
    printed = json.loads(done.stdout)
    assert set(json.loads(printed["answer"])) == {"color", "size"}
    assert printed["stop_reason"] == "stop"


def test_the_note_on_an_answer_that_was_cut_off_is_there_with_a_form_too(ask):
    strings = {"type": "array", "items": {"type": "string", "minLength": 9}, "minItems": 99}
    done = ask("--schema", json.dumps(strings), "--ctx-size", "64", "Hi")
    assert (done.returncode, done.stdout[:1]) == (0, b"[")
    assert b"cut off after 16 tokens; -n N allows more" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schema", "nowhere.json"), "nowhere.json: cannot be read (No such file or directory)"),
        (("--schema", "{}", "--grammar", "x"), "--schema and --grammar exclude each other"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused_before_the_model_is_looked_for(
    mixchat, arguments, message
):
    done = mixchat("run", "-m", "there/is-none", *arguments, "Hi", fake=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [f"error: {message}"]


def test_lines_of_a_file_have_forms_of_their_own(ask, tmp_path):
    by_schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    never = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"enum": []}}}
    asked = [{"prompt": "Hi", "response_format": form} for form in (by_schema, never)]
    asked.append({"prompt": "Hi", "grammar": 'root ::= "yes" | "no"'})
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in asked))
    done = ask("--jsonl", str(tmp_path / "in"))
    good, bad, by_grammar = map(json.loads, done.stdout.splitlines())
    assert by_grammar["answer"] in ("yes", "no")
    assert set(json.loads(good["answer"])) == {"color", "size"}
    assert "cannot be met at #: " in json.dumps(bad["error"])
