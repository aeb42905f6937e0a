"""KV caches in files, from one service to the next."""

import shutil

from mixchat.serving.service import Done
from mixchat.sessions.cache_file import ServerCaches, remove_server_caches
from waiter import Waiter, job


def test_kv_caches_in_files_serve_the_next_service(model_service, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    notes: list[str] = []

    def answers() -> tuple[list[str], list[int]]:
        service = model_service(caches=ServerCaches("tiny", notes.append))
        ends = [Waiter(service, job(number)).result() for number in (9, 20)]
        service.close()
        return [text for text, _ in ends], [last.cached_tokens for _, last in ends]

    texts, cached = answers()
    assert cached == [0, 0]
    assert answers() == (texts, [len(job(number).prompt_ids) - 1 for number in (9, 20)])
    files = sorted((tmp_path / "server" / "tiny").iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"x")
    assert answers()[0] == texts
    assert len(notes) == 1
    assert "it will be written again" in notes[0]


def test_a_directory_that_cannot_be_made_for_kv_caches_is_noted(
    model_service, monkeypatch, tmp_path
):
    """An error there ended the thread of the model, whose memory stayed in use."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    (tmp_path / "server").write_bytes(b"")
    notes: list[str] = []
    service = model_service(caches=ServerCaches("tiny", notes.append))
    service.close()
    assert len(notes) == 1
    assert "KV caches cannot be saved" in notes[0]


def test_a_directory_of_kv_caches_that_cannot_be_read_costs_a_line_and_not_the_start(
    model_service, monkeypatch, tmp_path
):
    """An error there ended the start of the server."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    (tmp_path / "server").symlink_to("server")
    notes: list[str] = []
    service = model_service(caches=ServerCaches("tiny", notes.append))
    assert isinstance(Waiter(service, job(9)).result()[1], Done)
    assert [note.partition(":")[0] for note in notes] == ["KV caches cannot be read"]


def test_removing_caches_leaves_the_files_of_others(monkeypatch, tmp_path):
    """The whole directory was removed with its model."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    directory = tmp_path / "server" / "tiny"
    (directory / "notes").mkdir(parents=True)
    for name in ("0.kv", "12.kv", "0.kv.x1.mixchat.tmp", "mine.kv", "0.kv.tmp"):
        (directory / name).write_bytes(b"x")
    remove_server_caches("tiny")
    remove_server_caches("other")
    assert {path.name for path in directory.iterdir()} == {"notes", "mine.kv", "0.kv.tmp"}
    shutil.rmtree(directory)
    directory.mkdir()
    remove_server_caches("tiny")
    assert not directory.exists()
