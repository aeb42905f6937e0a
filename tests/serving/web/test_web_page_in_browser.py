"""The page at `/` in a real browser: what a person sees and does, and what an answer cannot do."""

import json
from pathlib import Path

import browser
import pytest
from test_served_models import Shelf, models_of

from mixchat.serving.web.access import Access
from mixchat.text.thinking import ThinkingFormat

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium")
LONG = "A line.\n\n" * 60
ACTIVE = "document.activeElement.id"
ANSWERED = "document.querySelector('#stop').hidden && document.querySelector('.answer .note')"
# The last question is in the window, above the field.
QUESTION_IN_VIEW = """(() => {
  const field = document.querySelector("#ask").getBoundingClientRect();
  const last = [...document.querySelectorAll(".question .text")].at(-1).getBoundingClientRect();
  return last.top >= 0 && last.bottom <= field.top;
})()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    running = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture
def profile(chromium):
    chromium.seen.clear()
    profile = browser.Profile(chromium)
    yield profile
    profile.close()


@pytest.fixture
def page(profile, served):
    page = profile.open(served.url, "window.confirm = () => true")
    yield page
    assert page.faults() == []


def turns(*texts):
    """Questions and answers, by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def put(page, name, messages, saved=1):
    """Keep a chat in the browser, as the page does."""
    chat = {"id": name, "saved": saved, "system": "", "model": "", "messages": messages}
    key, value = json.dumps(f"mixchat:chat:{name}"), json.dumps(json.dumps(chat))
    page.run(f"localStorage.setItem({key}, {value})")


def open_chat(page, name, messages):
    put(page, name, messages)
    page.run(f"location.hash = '{name}'")
    page.wait(f"document.querySelectorAll('.turn').length === {len(messages)}")


def send(page, text):
    page.run("document.querySelector('#question').focus()")
    page.type(text)
    page.press("Enter")


def ask(page, text):
    """Ask, and wait for the answer."""
    send(page, text)
    page.wait(ANSWERED)
    page.wait("document.querySelector('#question').value === ''")


def kept(page):
    """The messages of the chats that the browser keeps."""
    values = page.run("Object.values(localStorage)")
    return [[m["content"] for m in json.loads(value)["messages"]] for value in values]


def fails(page):
    page.run("window.fetch = () => Promise.reject(new TypeError('no network'))")


def test_a_question_in_a_long_chat_scrolls_into_view(page):
    """The page looked for the end after it had added the question's 60 pixels."""
    open_chat(page, "long", turns("One?", LONG, "Two?", LONG))
    page.run("scrollTo(0, 300)")
    send(page, "say:{hang}")
    page.wait(QUESTION_IN_VIEW)
    page.press("Escape")
    page.wait(ANSWERED)


def test_the_window_follows_an_answer_until_the_reader_scrolls_up(page):
    ask(page, "say:" + LONG)
    page.wait("scrollY > 0 && innerHeight + scrollY >= document.body.scrollHeight - 2")
    send(page, "say:" + LONG + "{wait}" * 20 + LONG)
    page.run("new Promise((done) => requestAnimationFrame(done))")
    page.run("scrollTo(0, scrollY - 200)")
    height = page.run("scrollY")
    page.wait(ANSWERED)
    assert page.run("scrollY") <= height + 200
    page.wait("!document.querySelector('#down').hidden")


def test_a_reload_begins_at_the_last_turn(page):
    """It began at the top."""
    open_chat(page, "long", turns("One?", LONG, "Two?", LONG))
    page.run("scrollTo(0, 0)")
    page.reload()
    page.wait("document.querySelectorAll('.turn').length === 4")
    page.wait(QUESTION_IN_VIEW)
    assert page.run("scrollY") > 500


def test_escape_stops_an_answer_and_keeps_what_came(page):
    send(page, "say:Half{hang}")
    page.wait("document.querySelector('.answer .text').textContent.includes('Half')")
    page.press("Escape")
    page.wait(ANSWERED)
    assert page.text(".note") == "stopped"
    assert page.run(ACTIVE) == "question"
    assert kept(page) == [["say:Half{hang}", "Half"]]


def test_a_page_without_scripts_says_so(profile, served):
    page = profile.open(served.url, script=False)
    assert "JavaScript" in page.text("body")
    assert not page.run("document.querySelector('form').checkVisibility()")


def test_the_key_is_asked_for_and_the_focus_returns_to_the_question(profile, serve):
    page = profile.open(serve(Access(key="secret")).url)
    page.wait("document.querySelector('#key-field').checkVisibility()")
    assert page.run(ACTIVE) == "key-field"
    assert page.text("#problem") == ""
    assert "Authorization" not in page.text("body")
    page.type("wrong")
    page.press("Enter")
    page.wait("document.querySelector('#problem').textContent")
    assert "not the server's key" in page.text("#problem")
    page.wait(f"{ACTIVE} === 'key-field' && getSelection().toString()")  # to be typed over
    page.type("secret")
    page.press("Enter")
    page.wait(f"{ACTIVE} === 'question'")
    assert page.text("#problem") == ""
    ask(page, "say:Well")
    assert page.text(".answer .text") == "Well"


def test_an_answer_and_its_code_are_copied(page):
    answer = "Do *this*:\n\n```sh\nls -l\n```"
    open_chat(page, "code", turns("How?", answer))
    page.run("window.copied = []; navigator.clipboard.writeText = async (t) => copied.push(t)")
    page.click("[data-action=copy]")
    page.click("[data-action=copy-code]")
    assert page.wait("copied.length === 2 && copied") == [answer, "ls -l\n"]


def test_an_answer_is_copied_where_the_browser_has_no_clipboard(page):
    """Browsers have none for a page of another machine without TLS."""
    open_chat(page, "code", turns("How?", "Thus."))
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.run("addEventListener('copy', () => window.copied = document.activeElement.value)")
    page.click("[data-action=copy]")
    assert page.wait("window.copied") == "Thus."


def test_the_last_question_is_answered_again(page):
    open_chat(page, "again", turns("One?", "1", "say:new", "old"))
    page.click("[data-action=again]")
    page.wait("document.querySelectorAll('.answer .text')[1].textContent.trim() === 'new'")
    page.wait(ANSWERED)
    assert kept(page) == [["One?", "1", "say:new", "old", "new"]]
    assert page.run("document.querySelectorAll('.turn').length") == 4


def test_the_versions_of_an_answer_and_of_a_question_stay_and_are_chosen_by_the_keyboard(page):
    """A new answer and a changed question took the earlier ones away."""
    open_chat(page, "tree", turns("say:a", "first", "say:b", "b"))
    page.run("document.querySelector('[data-action=again]').click()")  # of the first answer
    page.wait(f"document.querySelectorAll('.turn').length === 2 && {ANSWERED}")
    assert page.texts(".version") == ["2 of 2"]
    page.run("document.querySelector('.earlier').focus()")
    page.press("Enter")
    assert page.texts(".turn .text") == ["say:a", "first\n", "say:b", "b\n"]
    assert page.run("document.activeElement.className") == "earlier"
    page.run("document.querySelector('[data-action=edit]').click()")  # of the first question
    page.run("document.activeElement.value = ''")
    ask(page, "say:c")
    assert page.texts(".turn .text") == ["say:c", "c\n"]
    page.reload()
    page.wait("document.querySelectorAll('.turn').length === 2")
    assert page.texts(".version") == ["2 of 2"]
    page.click("[data-action=later]")
    assert page.texts(".turn .text") == ["say:a", "a\n"]


def test_an_earlier_branch_stays_on_the_screen_if_a_changed_question_fails(page):
    open_chat(page, "tree", turns("One?", "1", "Two?", "2"))
    fails(page)
    page.run("document.querySelector('[data-action=edit]').click()")
    page.run("document.activeElement.value = ''")
    send(page, "Other?")
    page.wait("document.querySelector('#problem').textContent")
    page.reload()
    page.wait("document.querySelectorAll('.turn').length === 4")
    assert page.texts(".turn .text") == ["One?", "1\n", "Two?", "2\n"]
    assert page.run("document.querySelector('#question').value") == "Other?"


def test_a_stopped_answer_is_continued(page, served):
    send(page, "say:Half{hang}")
    page.wait("document.querySelector('.answer .text').textContent.includes('Half')")
    page.press("Escape")
    page.wait("document.querySelector('.proceed').checkVisibility()")
    begun = {"role": "assistant", "content": "Well, ", "isPartial": True}
    open_chat(page, "begun", [*turns("Hi"), begun])
    page.click("[data-action=proceed]")
    page.wait("document.querySelector('.answer .text').textContent.includes('Well, Hello')")
    page.wait(ANSWERED)
    assert served.prompt == "user: Hi\nWell, "
    assert ["Hi", "Well, Hello"] in kept(page)
    assert not page.run("document.querySelector('.proceed').checkVisibility()")


def test_a_draft_survives_a_reload(page):
    page.run("document.querySelector('#question').focus()")
    page.type("Something long")
    page.reload()
    assert page.run("document.querySelector('#question').value") == "Something long"
    ask(page, "")
    page.reload()
    assert page.run("document.querySelector('#question').value") == ""


def test_the_temperature_is_the_chats_own_and_the_room_in_the_context_is_told(page, served):
    page.wait("document.querySelector('#room').textContent")
    assert page.text("#room") == "100% of the context left"
    page.run("document.querySelector('#system-button').click()")
    page.run("document.querySelector('#temperature').focus()")
    page.type("0.25")
    page.press("Escape")
    assert page.text("#system-button") == "Settings: on"
    ask(page, "say:" + "x" * 400)
    assert served.requests[-1].sampling.temperature == 0.25
    assert page.text("#room") != "100% of the context left"
    page.reload()
    assert page.run("document.querySelector('#temperature').value") == "0.25"


def drop(page, *files):
    """Drop files on the page, each given by its name and a script's expression of its content."""
    adds = "".join(f"data.items.add(new File([{text}], {json.dumps(n)}));" for n, text in files)
    page.run(
        f"{{ const data = new DataTransfer(); {adds}"
        " document.body.dispatchEvent(new DragEvent('drop',"
        " { dataTransfer: data, bubbles: true, cancelable: true })) }"
    )


def test_text_files_are_dropped_before_the_question(page):
    page.run("document.querySelector('#question').focus()")
    page.type("What is this?")
    drop(page, ("a.txt", "'one'"), ("b.md", "'```\\nx\\n```'"))
    page.wait("document.querySelector('#question').value.includes('b.md')")
    text = "a.txt:\n```\none\n```\n\nb.md:\n````\n```\nx\n```\n````\n\nWhat is this?"
    assert page.run("document.querySelector('#question').value") == text
    assert page.run(ACTIVE) == "question"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("new Uint8Array([0xff, 0xd8])", "a.bin is not text in UTF-8. Attach text files only."),
        ("'a\\0b'", "a.bin is not text in UTF-8. Attach text files only."),
        ("'x'.repeat(1e7)", "a.bin has 10,000 kB, and there is room for about"),
    ],
)
def test_a_file_that_is_no_text_or_too_large_gets_one_line(page, content, message):
    page.wait("document.querySelector('#room').textContent")
    drop(page, ("a.bin", content))
    assert page.wait("document.querySelector('#problem').textContent").startswith(message)
    assert page.run("document.querySelector('#question').value") == ""


def test_chats_are_searched_and_renamed(page):
    put(page, "a", turns("One?", "About Whales"), saved=1)
    put(page, "b", turns("Two?", "About mice"), saved=2)
    page.run("location.hash = 'a'")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.run("document.querySelector('#search').focus()")
    page.type("whales")
    assert page.texts("#chats li a") == ["One?"]
    page.run("window.prompt = () => 'Sea'")
    page.click("#rename")
    assert page.texts("#chats li a") == ["Sea"]
    page.reload()
    page.wait("document.querySelectorAll('#chats li a').length === 2")
    assert page.texts("#chats li a") == ["Sea", "Two?"]
    page.run("document.querySelector('#search').focus()")
    page.type("dragons")
    assert page.text(".empty") == "No chat has this text."


def test_a_chat_is_exported_without_the_server(page):
    open_chat(page, "out", turns("One? <b>", "*1*"))
    fails(page)
    page.run("window.saved = []; addEventListener('click', (e) => e.preventDefault())")
    page.run(
        "URL.createObjectURL = (blob) => { blob.text().then((text) => saved.push(text));"
        " return 'blob:x' }"
    )
    page.click("#markdown")
    page.click("#json")
    markdown, text = page.wait("saved.length === 2 && saved")
    assert markdown == "# One? <b>\n\n## Question\n\nOne? <b>\n\n## Answer\n\n*1*\n"
    assert json.loads(text)["messages"] == turns("One? <b>", "*1*")
    assert page.run("document.querySelector('#markdown').download") == "One_ _b_.md"


def test_an_earlier_answer_stays_if_a_new_one_fails(page):
    open_chat(page, "again", turns("One?", "1"))
    fails(page)
    page.click("[data-action=again]")
    page.wait("document.querySelector('#problem').textContent")
    assert page.texts(".turn .text") == ["One?", "1\n"]
    assert page.run("document.querySelector('#question').value") == ""
    assert kept(page) == [["One?", "1"]]


def test_a_question_that_gets_no_answer_is_in_the_field_again(page):
    fails(page)
    send(page, "Well?")
    page.wait("document.querySelector('#problem').textContent")
    assert "mixchat serve" in page.text("#problem")
    assert page.run("document.querySelector('#question').value") == "Well?"
    page.reload()
    assert page.wait("document.querySelector('#question').value") == "Well?"


def test_the_last_question_is_changed(page):
    open_chat(page, "edit", turns("One?", "1", "Tow?", "2"))
    page.click("[data-action=edit]")
    assert page.wait(f"{ACTIVE} === 'question' && document.activeElement.value") == "Tow?"
    page.run("document.activeElement.value = ''")
    ask(page, "say:two")
    assert kept(page) == [["One?", "1", "Tow?", "2", "say:two", "two"]]


def test_escape_gives_the_field_back_after_a_change_of_mind(page):
    open_chat(page, "edit", turns("One?", "1"))
    send_later = "Something long that I typed"
    page.run("document.querySelector('#question').focus()")
    page.type(send_later)
    page.click("[data-action=edit]")
    page.press("Escape")
    assert page.run("document.querySelector('#question').value") == send_later
    assert page.texts(".turn .text") == ["One?", "1\n"]


def test_chats_are_listed_opened_and_deleted(page):
    ask(page, "say:one")
    page.click("#new")
    assert page.texts(".turn") == []
    ask(page, "say:two")
    assert page.texts("#chats li a") == ["say:two", "say:one"]
    page.click("#chats li a")
    page.wait("document.querySelector('.answer .text').textContent.trim() === 'one'")
    page.reload()
    page.wait("document.querySelector('.answer .text').textContent.trim() === 'one'")
    page.click("[aria-current] + [data-action=delete]")
    assert page.texts("#chats li a") == ["say:two"]
    assert page.texts(".turn") == []
    page.click("#forget")
    assert kept(page) == []


def test_damaged_chats_are_left_out_of_the_list(page):
    for i, value in enumerate(
        ["{", "null", "3", "[]", '{"saved": 1, "messages": [{"role": "user", "content": {}}]}']
    ):
        page.run(f"localStorage.setItem('mixchat:chat:{i}', {json.dumps(value)})")
    put(page, "bad", [{"role": "system", "content": "x"}])
    no_system = {"saved": 1, "model": "", "messages": turns("No system?")}
    page.run(f"localStorage.setItem('mixchat:chat:s', {json.dumps(json.dumps(no_system))})")
    put(page, "good", turns("Fine?", "Yes"))
    page.go(page.run("location.origin") + "/#0")
    page.reload()
    page.wait("document.querySelector('#chats li a')")
    assert page.texts("#chats li a") == ["Fine?"]
    ask(page, "say:well")
    assert page.texts("#chats li a") == ["say:well", "Fine?"]


def test_two_tabs_with_one_chat_lose_nothing(page, profile, served):
    open_chat(page, "both", turns("One?", "1"))
    other = profile.open(f"{served.url}/#both")
    other.wait("document.querySelectorAll('.turn').length === 2")
    send(other, "say:slow{hang}")
    other.wait("document.querySelector('.turn:last-child .text').textContent.includes('slow')")
    ask(page, "say:quick")
    other.press("Escape")
    other.wait(ANSWERED)
    assert sorted(kept(page)) == [
        ["One?", "1", "say:quick", "quick"],
        ["One?", "1", "say:slow{hang}", "slow"],
    ]


def test_a_full_storage_is_told_and_the_chat_goes_on(page):
    page.run(
        "for (let n = 1 << 20; n; n >>= 1) for (;;) try {"
        " localStorage.setItem('x' + n + Math.random(), 'x'.repeat(n)) } catch { break }"
    )
    ask(page, "say:well")
    assert "no room" in page.text("#problem")
    assert page.text(".answer .text") == "well"


def test_a_browser_that_keeps_nothing_chats_all_the_same(profile, served):
    refuse = "{ get() { throw new DOMException('no', 'SecurityError') } }"
    names = ("localStorage", "sessionStorage")
    defined = [f"Object.defineProperty(window, '{name}', {refuse});" for name in names]
    page = profile.open(served.url, "".join(defined))
    ask(page, "say:well")
    assert page.text(".answer .text") == "well"


def test_a_model_is_picked(profile, serve):
    shelf = Shelf()
    page = profile.open(serve(models=models_of(shelf)).url)
    page.wait("document.querySelector('#models').length === 2")
    assert page.texts("#models option") == ["a", "b"]
    ask(page, "say:well")
    assert page.text(".note").startswith("a, ")
    page.run(
        "{ const all = document.querySelector('#models'); all.value = 'b';"
        " all.dispatchEvent(new Event('change')) }"
    )
    page.click("[data-action=again]")
    page.wait("document.querySelector('.note').textContent.startsWith('b, ')")
    assert shelf.open == ["b"]
    page.reload()
    page.wait("document.querySelector('#models').length === 2")
    assert page.run("document.querySelector('#models').value") == "b"


def test_the_system_prompt_goes_before_the_question(page, served):
    page.run("document.querySelector('#system-button').focus()")
    page.press("Enter")
    page.wait(f"{ACTIVE} === 'system-text'")
    page.type("Be brief.")
    page.press("Escape")
    page.wait(f"{ACTIVE} === 'system-button'")
    ask(page, "say:well")
    prompt = served.model.tokenizer.decode(served.requests[0].ids)
    assert prompt.startswith("system: Be brief.\nuser: say:well")


def test_an_answer_that_is_only_thinking_is_shown_folded_and_kept(page, served):
    """It was taken away, and the question stood in its field again."""
    served.model.template.thinking = ThinkingFormat("tags", ())
    ask(page, "say:<think>Hm, hm.</think>")
    assert page.text("summary") == "Thought, 2 words"
    assert not page.run("document.querySelector('.thought').checkVisibility()")
    page.reload()
    assert page.wait("document.querySelector('summary')?.textContent") == "Thought, 2 words"


def test_a_screen_reader_gets_an_answer_once_and_not_by_token(page):
    page.run(
        "window.said = []; new MutationObserver(() => {"
        " const text = document.querySelector('#announcer').textContent; if (text) said.push(text)"
        "}).observe(document.querySelector('#announcer'), { childList: true })"
    )
    ask(page, "say:Several words of an answer{wait} that come one by one")
    said = page.wait("said.length > 1 && said")
    assert said[1:] == ["Several words of an answer that come one by one"]
    assert page.run("document.querySelector('#turns').closest('[aria-live]')") is None


def test_code_has_colours_and_formulas_are_formulas(page):
    answer = "```python\ndef f(): pass\n```\n\n\\(a_1^2\\)\n\n$$\n\\frac{1}{2}\n$$\n\n$\\nonsense{$"
    open_chat(page, "formulas", turns("How?", answer))
    page.wait("document.querySelector('.hljs-keyword') && document.querySelector('mfrac')")
    assert page.texts(".hljs-keyword") == ["def", "pass"]
    assert page.texts("msubsup mi, mfrac mn") == ["a", "1", "2"]
    assert "$\\nonsense{$" in page.text(".answer .text")


def test_a_block_that_stays_the_same_keeps_its_elements_while_an_answer_grows(page):
    """Else a selection in it would be lost with each token."""
    send(page, "say:First\n\nSecond{hang}")
    page.wait("document.querySelector('.answer .text').textContent.includes('Second')")
    first = "document.querySelector('.answer .text').firstChild"
    page.run(f"window.first = {first}")
    page.press("Escape")
    page.wait(ANSWERED)
    assert page.run(f"{first} === window.first")


def test_all_that_scrolls_is_reached_by_the_keyboard_alone(page):
    wide = "x" * 500
    answer = f"```\n{wide}\n```\n\n|{wide}|b|\n|-|-|\n|1|2|"
    open_chat(page, "wide", turns("How?", answer))
    reached = []
    page.run("document.body.focus(); document.querySelector('#new').focus()")
    for _ in range(14):
        page.press("Tab")
        reached.append(
            page.run("document.activeElement.tagName + document.activeElement.className")
        )
    assert {"PRE", "DIVscrolls", "BUTTONcopy", "BUTTONagain", "BUTTONedit"} <= set(reached)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_text_of_an_answer_cannot_act_or_load_or_leave_its_turn(page, served):
    evil = Path(__file__).with_name("hostile_texts.json")
    texts = json.loads(evil.read_text())
    messages = [message for text in texts for message in turns(text, text)]
    put(page, "titled", messages[2:])
    open_chat(page, "hostile", messages)
    # Every turn comes near the window once, and gets its colours and formulas.
    count = page.run("document.querySelectorAll('.turn').length")
    for i in range(count):
        page.run(f"document.querySelectorAll('.turn')[{i}].scrollIntoView()")
        page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)))")
    assert page.run("window.hacked") is None
    loaded = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
    assert loaded
    assert [url for url in loaded if not url.startswith(served.url)] == []
    links = page.run("[...document.querySelectorAll('.turn a')].map((a) => [a.href, a.rel])")
    assert links
    for url, relation in links:
        assert url.startswith(("http://", "https://", "mailto:"))
        assert relation == "noopener noreferrer"
    names = page.run(
        "[...new Set([...document.querySelectorAll('.turn .text *')].map((n) => n.localName))]"
    )
    assert not {"script", "img", "iframe", "form", "input", "style", "svg", "object"} & set(names)
    assert page.run(
        "[...document.querySelectorAll('.turn')].every("
        "(turn) => getComputedStyle(turn).overflow === 'clip')"
    )
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run("document.querySelectorAll('#ask').length") == 1
