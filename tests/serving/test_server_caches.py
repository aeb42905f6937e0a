"""KV caches in files, from one service to the next."""

from waiter import Waiter, job

from mixchat.serving.service import Done
from mixchat.sessions.cache_file import ServerCaches


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
