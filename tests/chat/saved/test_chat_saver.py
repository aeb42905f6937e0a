"""A chat is on the disk as it goes, and comes back as it was."""

import threading
from threading import Thread

from mixchat.chat.saved.chat_saver import ChatSaver
from mixchat.chat.saved.chat_store import ChatStore


def talk(session, *questions):
    for question in questions:
        list(session.ask(question))


def saver_after(store, session, *questions, **options):
    """The saver of a chat with these questions, which is saved."""
    saver = ChatSaver(session, store, "demo", **options)
    talk(session, *questions)
    saver.save()
    return saver


def resumed(store, session, question, **options):
    """The saver of a run that resumed the last chat, and got an answer that is not saved yet."""
    saver = ChatSaver(session, store, "demo", **options)
    saver.resume(store.load("last"))
    talk(session, question)
    return saver


def questions_in(store):
    whole = [store.load(saved.id) for saved in store.all()]
    return sorted([m.content for m in chat.messages if m.role == "user"] for chat in whole)


def test_each_save_has_all_that_was_said(session_of, store):
    session = session_of("Hello", "Fine")
    saver = ChatSaver(session, store, "demo")
    for question, turns in (("Hi", 1), ("And you?", 2)):
        talk(session, question)
        saver.save()
        (saved,) = store.all()
        assert (saved.turns, saved.question, saved.model) == (turns, "Hi", "demo")


def test_a_chat_comes_back_as_it_was(session_of, store):
    session = session_of("Hel", system="Be brief", max_tokens=3)
    session.changed = {"temperature": 0.25, "top_k": 7, "seed": 9}
    saver = saver_after(store, session, "Hi")
    other = session_of("more")
    ChatSaver(other, store, "demo").resume(store.load(saver.chat.id))
    assert other.history == session.history
    assert other.history[-1].partial
    assert other.sampling == {"temperature": 0.25, "top_k": 7, "seed": 9}
    talk(other, "Again")
    assert other.engine.prompts[0][: len("[system]Be brief")] == [*map(ord, "[system]Be brief")]


def test_what_a_flag_gives_is_not_taken_from_the_chat(session_of, store):
    session = session_of("Hello", system="Be brief")
    session.changed = {"temperature": 0.25, "top_k": 7}
    saver_after(store, session, "Hi")
    other = session_of(system="Be long", sampling={"temperature": 0.9})
    ChatSaver(other, store, "demo").resume(store.load("last"), except_for=["system", "temperature"])
    assert (other.system, other.sampling) == ("Be long", {"temperature": 0.9, "top_k": 7})


def test_tokens_of_another_model_are_forgotten_and_their_text_is_not(session_of, store):
    saver_after(store, session_of("Hello"), "Hi")
    other = session_of()
    other.engine.identity = "other weights"
    ChatSaver(other, store, "other").resume(store.load("last"))
    assert [(m.content, m.ids) for m in other.history] == [("Hi", None), ("Hello", None)]


def test_a_disk_that_cannot_be_written_is_said_once_and_the_chat_continues(session_of, tmp_path):
    (tmp_path / "file").write_text("")
    session, said = session_of("a", "b", "c"), []
    saver = ChatSaver(session, ChatStore(tmp_path / "file" / "chats"), "demo", warn=said.append)
    for question in "123":
        talk(session, question)
        saver.save()
    assert len(said) == 1
    assert len(session.history) == 6


def test_a_chat_that_was_changed_in_another_session_is_saved_as_a_new_one(session_of, store):
    """The one that was saved last won, and the other's turns were gone."""
    session, said = session_of("Hello", "here"), []
    first = saver_after(store, session, "Hi", note=said.append)
    second = resumed(store, session_of("there"), "second", note=said.append)
    second.save()
    assert said == []
    talk(session, "first")
    first.save()
    assert said == [f"this chat was changed in another session; saved as {first.chat.id}"]
    assert [m.content for m in store.load(second.chat.id).messages[2:]] == ["second", "there"]
    assert [m.content for m in store.load(first.chat.id).messages[2:]] == ["first", "here"]
    first.save()
    assert len(said) == 1


def test_no_turn_is_lost_if_several_processes_save_at_once(session_of, store):
    """Of two processes that had resumed one chat, 11 of 60 times one's turn was in no file."""
    saver_after(store, session_of("Hello"), "Hi")
    said = []
    savers = [resumed(store, session_of("a"), f"{n}", note=said.append) for n in range(6)]
    ready = threading.Barrier(len(savers))
    threads = [Thread(target=lambda s=s: (ready.wait(), s.save_or_raise())) for s in savers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert questions_in(store) == [["Hi", f"{n}"] for n in range(6)]
    assert len(said) == 5


def test_a_new_chat_whose_id_another_was_given_is_saved_under_one_of_its_own(
    session_of, store, monkeypatch
):
    monkeypatch.setattr("mixchat.chat.saved.chat_store.secrets.choice", lambda letters: "a")
    first, second = (ChatSaver(session_of("x"), store, "demo") for _ in range(2))
    assert first.chat.id == second.chat.id
    monkeypatch.undo()
    for saver, question in ((first, "one"), (second, "two")):
        talk(saver.session, question)
        saver.save()
    assert questions_in(store) == [["one"], ["two"]]


def test_a_chat_that_was_removed_elsewhere_is_saved_again(session_of, store):
    saver = saver_after(store, session := session_of("Hello", "Fine"), "Hi")
    store.remove(saver.chat.id)
    talk(session, "And you?")
    saver.save()
    assert questions_in(store) == [["Hi", "And you?"]]


def test_after_clear_a_chat_is_saved_only_if_all_are(session_of, store):
    """It was saved for ever after one /save in a run with --no-save."""
    session = session_of("a", "b")
    saver = ChatSaver(session, store, "demo", autosave=False)
    talk(session, "one")
    saver.rename("mine")
    session.clear()
    saver.start_new()
    talk(session, "a secret")
    saver.save()
    assert [saved.question for saved in store.all()] == ["one"]
