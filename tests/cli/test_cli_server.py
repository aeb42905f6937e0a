"""`mixchat run --server`: the same command, and the same chat, where a server answers."""

import json
import threading

import fake_mixchat
import pytest
import typer
from command_line import loaded_by
from patience import PATIENCE_S
from scripted_server import (
    Answer,
    ScriptedServer,
    as_json,
    delta,
    read_request,
    refusal,
    says,
    usage,
)

from mixchat.cli.app import app
from mixchat.cli.flags import run_flags


@pytest.fixture
def ask(mixchat):
    """Runs `mixchat run --server SERVER ARGS`."""
    return lambda server, *arguments, **how: mixchat(
        "run", "--server", server.address, *arguments, **how
    )


def test_json_has_what_the_server_tells_and_null_for_the_rest(ask):
    models = as_json({"data": [{"id": "big", "context_size": 4096}]})
    with ScriptedServer(says("Hi", counts=usage(5, 2, 1)), models=models) as server:
        raw = json.loads(ask(server, "--json", "Hi").stdout)
    assert raw["usage"] == {
        "prompt_tokens": 5,
        "cached_tokens": 1,
        "generated_tokens": 2,
        "context_tokens": 4096,
    }
    assert (raw["model"], raw["answer"], raw["ids"], raw["seed"]) == ("big", "Hi", None, None)
    with ScriptedServer(says("Hi")) as server:
        counts = json.loads(ask(server, "--json", "Hi").stdout)["usage"]
    assert (counts["prompt_tokens"], counts["context_tokens"]) == (None, None)


def test_verbose_says_what_it_knows(ask):
    with ScriptedServer(says("a", "b", counts=usage(5, 2)), says("a", "b")) as server:
        told = ask(server, "--verbose", "Hi").stderr.decode()
        not_told = ask(server, "--verbose", "Hi").stderr.decode()
    assert "prompt   5 tokens, 0 of them from the cache" in told
    assert "experts  the server does not tell" in told
    assert "seed     left to the server" in told
    assert "prompt   the server does not tell" in not_told


def test_what_was_asked_is_sent_and_the_answer_is_printed_as_it_is(ask, tmp_path):
    (tmp_path / "notes").write_text("Notes.")
    flags = ("--temp", "0.7", "--min-p", "0", "-n", "5", "--stop", "x", "-s", "Be brief")
    with ScriptedServer(says("Par", "is.\x1b[2J"), says("Look:\n```sh\nls\n```\n")) as server:
        done = ask(server, "-f", tmp_path / "notes", *flags, "List files", stdin=b"First.")
        assert ask(server, "-m", "mine", "-x", "Hi").stdout == b"ls\n"
    assert (done.stdout, done.stderr, done.returncode) == (b"Paris.\x1b[2J\n", b"", 0)
    body, second = server.asked()
    assert [m["content"] for m in body.pop("messages")] == [
        "Be brief",
        "First.\n\nNotes.\n\nList files",
    ]
    for name in ("stream", "stream_options"):
        del body[name]
    assert body == {"model": "tiny", "temperature": 0.7, "min_p": 0, "max_tokens": 5, "stop": ["x"]}
    assert second["model"] == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ["--ctx-size", "100", "--device", "cpu"],
        ["--host-memory", "1GB", "--device-memory", "1GB"],
        ["--worker", "10.0.0.1", "--key-file", "k"],
        ["--kv-bits", "8", "--exact-prompts", "--keep-cache"],
        ["--prompt-cache", "c"],
    ],
)
def test_flags_of_loading_are_refused_by_name_before_anything_is_asked(ask, flags):
    with ScriptedServer() as server:
        done = ask(server, *flags, "Hi")
    named = ", ".join(flag for flag in flags if flag.startswith("--"))
    first = done.stderr.decode().splitlines()[0]
    assert set(first.removeprefix("error: --server does not go with ").split(", ")) == set(
        named.split(", ")
    )
    assert (done.returncode, server.requests) == (2, [])


def test_each_flag_of_run_either_works_with_a_server_or_is_refused():
    """A new flag that says how to load a model has to be added to those that are refused."""
    work = {"prompt", "file", "model", "server", "system", "system_file", "temperature", "top_p"}
    work |= {"top_k", "min_p", "repeat_penalty", "seed", "max_tokens", "stop", "overflow"}
    work |= {"resume", "save", "raw", "vi", "as_json", "extract", "stream", "quiet", "verbose"}
    work |= {"schema", "grammar", "jsonl", "resume_from", "keep_failed", "parallel", "think"}
    work |= {"kept_prompt"}
    command = typer.main.get_command(app).commands["run"]
    names = {parameter.name for parameter in command.params}
    assert names == work | set(run_flags._FOR_LOADING)


def lines_of(*texts):
    return b"".join(json.dumps({"prompt": text}).encode() + b"\n" for text in texts)


def test_a_file_of_prompts_is_answered_as_it_is_here(ask):
    """`--server` refused `--jsonl`."""
    stdin = b'{"prompt": "Hi", "id": "a", "seed": 5, "top_k": 3}\n'
    with ScriptedServer(says("Par", "is", counts=usage(9, 2, 4))) as server:
        done = ask(
            server, "--jsonl", "-", "-s", "Be brief", "--temp", "0.5", "-n", "7", stdin=stdin
        )
    assert json.loads(done.stdout) == {
        "line": 1,
        "id": "a",
        "answer": "Paris",
        "stop_reason": "stop",
        "seed": 5,
        "usage": {"prompt_tokens": 9, "cached_tokens": 4, "generated_tokens": 2},
    }
    (body,) = server.asked()
    assert body["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
    ]
    given = {name: body[name] for name in ("model", "temperature", "max_tokens", "seed", "top_k")}
    assert given == {"model": "tiny", "temperature": 0.5, "max_tokens": 7, "seed": 5, "top_k": 3}


def test_a_line_that_the_server_refuses_has_an_error_and_a_busy_server_is_asked_again(ask):
    answers = [refusal("400 B", "bad colour"), refusal("429 B", "busy", Retry_After="0")]
    with ScriptedServer(*answers, says("Fine")) as server:
        done = ask(server, "--jsonl", "-", "--parallel", "1", stdin=lines_of("a", "b"))
    first, second = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, second["answer"]) == (3, "Fine")
    assert first == {"line": 1, "error": "the server says: bad colour"}
    assert b"error: 1 of 2 lines could not be answered" in done.stderr


def test_a_server_that_breaks_off_ends_the_run_and_the_next_one_resumes(ask, tmp_path):
    out = str(tmp_path / "out")
    broken = [says("One"), Answer([delta("Tw")], end="reset")]
    how = ("--jsonl", "-", "--parallel", "1", "--resume-from", out)
    with ScriptedServer(*broken) as server:
        done = ask(server, *how, stdin=lines_of("a", "b"))
    assert done.returncode == 5
    with ScriptedServer(says("Two")) as server:
        assert ask(server, *how, stdin=lines_of("a", "b")).returncode == 0
    with open(out) as file:
        assert [json.loads(line)["answer"] for line in file] == ["One", "Two"]


def test_several_lines_are_asked_at_once_and_their_answers_keep_the_order(ask):
    class Together(ScriptedServer):
        """Answers nobody before three requests are here."""

        def __init__(self):
            super().__init__()
            self.three = threading.Barrier(3, timeout=PATIENCE_S)

        def handle(self, connection):
            with connection:
                request = read_request(connection)
                if request.method == "GET":
                    self.models.send(connection)
                    return
                self.three.wait()
                says(request.body["messages"][-1]["content"]).send(connection)

        def _serve(self):
            while True:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    return
                threading.Thread(target=self.handle, args=[connection], daemon=True).start()

    with Together() as server:
        done = ask(server, "--jsonl", "-", "--parallel", "3", stdin=lines_of("a", "b", "c"))
    assert [json.loads(line)["answer"] for line in done.stdout.splitlines()] == ["a", "b", "c"]


def test_a_grammar_is_sent_as_the_field_that_servers_have_for_it(ask, tmp_path):
    """`--server` refused `--grammar`."""
    pytest.importorskip("llguidance")
    grammar = tmp_path / "answer.gbnf"
    grammar.write_text('root ::= "yes" | "no"\n')
    with ScriptedServer(says("yes")) as server:
        done = ask(server, "--grammar", str(grammar), "Is it?")
    assert done.stdout == b"yes\n"
    assert server.asked()[0]["grammar"] == grammar.read_text()


def test_a_variable_gives_the_server_and_an_empty_flag_none(mixchat):
    """Settings of loading are for other runs."""
    with ScriptedServer(says("Hi")) as server:
        given = {"MIXCHAT_SERVER": server.address, "MIXCHAT_CTX_SIZE": "100"}
        assert mixchat("run", "Hi", **given, MIXCHAT_MODEL="instruct").stdout == b"Hi\n"
        assert mixchat("run", "--server", "", "Hi", **given).stdout == b"Hello\n"
    assert server.asked()[0]["model"] == "tiny"


def test_the_key_comes_from_its_variable_and_no_other(ask):
    with ScriptedServer(says("Hi"), says("Hi")) as server:
        ask(server, "Hi", MIXCHAT_API_KEY="secret")
        ask(server, "Hi", OPENAI_API_KEY="for another host")
    keys = [request.headers.get("authorization") for request in server.requests]
    assert keys == ["Bearer secret"] * 2 + [None] * 2


def test_a_server_without_models_asks_for_a_name(ask):
    with ScriptedServer(says("Hi"), models=as_json({"data": []})) as server:
        assert ask(server, "Hi").returncode == 4
        assert ask(server, "-m", "x", "Hi").stdout == b"Hi\n"


def test_what_came_of_an_answer_is_printed_and_saved(ask, mixchat):
    with ScriptedServer(Answer([delta("Half an ans")]), says("wer")) as server:
        done = ask(server, "--save", "Hi")
        assert done.stdout.startswith(b"Half an ans")
        assert done.returncode == 5
        ask(server, "--resume", "last", "Go on")
    assert server.asked()[1]["messages"][1] == {"role": "assistant", "content": "Half an ans"}


def test_a_chat_moves_from_here_to_a_server_and_back(ask, mixchat):
    """The numbers that nobody chose stay here: a server may not know them."""
    mixchat("run", "--save", "--temp", "0.2", "Hi", SCRIPT='["Hello"]')
    with ScriptedServer(says("Fine")) as server:
        ask(server, "--resume", "last", "How are you?")
    (body,) = server.asked()
    assert [m["content"] for m in body["messages"]] == ["Hi", "Hello", "How are you?"]
    assert body["temperature"] == 0.2
    assert not {"top_k", "min_p", "repeat_penalty", "top_p"} & set(body)
    assert body["model"] == "tiny"
    done = mixchat("run", "--resume", "last", "--json", "And?")
    assert json.loads(done.stdout)["model"] == "instruct"  # `tiny` is not known here


def test_a_chat_stays_with_the_server_s_model(ask):
    with ScriptedServer(says("Hello"), says("Fine")) as server:
        ask(server, "--save", "-m", "other", "Hi")
        ask(server, "--resume", "last", "How are you?")
    assert [body["model"] for body in server.asked()] == ["other", "other"]


def test_a_name_of_a_model_here_is_a_word_like_others(ask):
    with ScriptedServer(says("Hi")) as server:
        assert ask(server, "demo", "Hi").stdout == b"Hi\n"


def test_it_does_not_load_what_only_an_engine_needs(environment):
    with ScriptedServer(says("Hi")) as server:
        _, output, loaded = loaded_by(environment, "run", "--server", server.address, "Hi")
    assert output == "Hi\n"
    assert not {"torch", "numpy", "bitsandbytes", "huggingface_hub", "rich"} & loaded


def test_a_server_that_has_the_model_already_is_noted(mixchat, monkeypatch):
    monkeypatch.setattr(fake_mixchat, "SERVED", {"demo"})
    assert mixchat("run", "-m", "instruct", "Hi").stderr == b""
    assert mixchat("run", "-m", "demo", "--quiet", "Hi").stderr == b""
    assert mixchat("run", "-m", "demo", "Hi").stderr == (
        b"note: a server with demo is running: --server 127.0.0.1:11435 answers without loading it "
        b"again\n"
    )
