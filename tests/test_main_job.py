"""The main job as a person meets it: one command builds the demo model and answers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mixchat as mixchat_api

pytestmark = [pytest.mark.demo, pytest.mark.slow]

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory in which `mixchat run -m demo` was the first command ever."""
    home = tmp_path_factory.mktemp("home")
    first = mixchat(home, "run", "-m", "demo", "--temp", "0", "--repeat-penalty", "1", QUESTION)
    assert "The capital of France is Paris" in first.stdout
    assert "quantizing" in first.stderr
    yield home
    for path in (home / "models" / "demo").iterdir():  # 0.5 GB, which pytest would keep
        path.unlink()


def mixchat(home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mixchat", *arguments],
        env={**os.environ, "MIXCHAT_HOME": str(home)},
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_answer_is_byte_identical_for_every_size_of_the_cache(home):
    """Two experts of 240 are the least: 1.41 MB each, in whole pages."""
    story = ("run", "-m", "demo", "--seed", "7", "-n", "24", "Tell me a story about a lighthouse.")
    answers = {
        size: mixchat(home, *story, "--host-memory", size, "--verbose")
        for size in ("2.83MB", "30%", "100%")
    }
    assert len({answer.stdout for answer in answers.values()}) == 1
    assert "2 RAM slots" in answers["2.83MB"].stderr
    assert "240 RAM slots" in answers["100%"].stderr


def test_chat_turns_prefill_only_new_tokens(home):
    """Only the face is needed: a question, its answer's message, and the next question."""
    messages = [mixchat_api.Message("user", "My name is Ada. What is the capital of France?")]
    options = {"temperature": 0, "max_tokens": 24}
    with mixchat_api.load(str(home / "models" / "demo"), device="cpu") as model:
        *_, first = model.chat(messages, **options)
        messages += [first.message, {"role": "user", "content": "And of Italy?"}]
        *_, second = model.chat(messages, **options)
    seen = first.stats.prompt_tokens + first.stats.generated_tokens
    after = second.stats
    assert after.reused_tokens >= seen - 2  # the last token, and an end token the template adds
    assert after.prompt_tokens - after.reused_tokens < 25
