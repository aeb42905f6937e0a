"""The text of PDFs and pages of HTML, and what is said of the rest."""

from __future__ import annotations

import io

import pytest
from document_tools import deflated_zeros, pdf
from pypdf import PdfReader, PdfWriter

from mixchat.base.context import UNKNOWN_CONTEXT, Context
from mixchat.base.errors import MissingDependencyError, PromptError, PromptTooLongError
from mixchat.chat.documents.document import html_text, pdf_text
from mixchat.chat.plain_text import read_source

BLOG = """<!DOCTYPE html><html><head><title>Caches</title><style>p{color:red}</style>
<script>var secret = "TRACKING";</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/login">Log in</a></li></ul></nav>
<div class="cookie-banner">We use cookies. <button>Accept all</button></div>
<aside class="sidebar"><h3>Popular posts</h3><ul><li>Ten editors compared</li></ul></aside>
<main><article><h1>Why caches miss</h1>
<p>A cache keeps what was used <em>recently</em>, in the hope that it is used again soon.</p>
<pre><code>def total(values):
    return sum(values) &lt; 3
</code></pre>
<ul><li>Capacity misses</li><li>Conflict misses</li></ul>
<table><tr><th>Level</th><th>Cycles</th></tr><tr><td>L1</td><td>4</td></tr></table></article></main>
<footer><p>Copyright. <a href="/privacy">Privacy policy</a></p></footer></body></html>"""


def read(tmp_path, data, context=UNKNOWN_CONTEXT):
    path = tmp_path / "paper.pdf"
    path.write_bytes(data)
    notes = []
    return read_source(str(path), context, notes.append).strip(), notes


def encrypted(password, algorithm):
    writer = PdfWriter(PdfReader(io.BytesIO(pdf(["Secret"]))))
    writer.encrypt(password, "owner", algorithm=algorithm)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_a_pdf_gives_the_text_of_its_pages_and_says_which_have_none(tmp_path):
    text, notes = read(tmp_path, pdf(["First page", "", "Third page"]))
    assert text == "First page\n\nThird page"
    (note,) = notes
    assert note.endswith("paper.pdf: 3 pages, 1 without text (pictures are left out)")


def test_a_pdf_that_forbids_printing_alone_is_read(tmp_path):
    assert read(tmp_path, encrypted("", "RC4-128"))[0] == "Secret"


CASES = {
    "scanned": (pdf(["", ""]), "has no text on its 2 pages"),
    "without pages": (pdf([]), "has no page"),
    "empty": (b"", "is empty"),
    "header alone": (b"%PDF-1.7\n", "is a broken PDF"),
    "cut off": (pdf(["First page"])[:300], "is a broken PDF"),
    "password": (encrypted("key", "RC4-128"), "is encrypted"),
    "bomb": (pdf([deflated_zeros(2 * 10**9)]), "no page that can be read"),
    "pages that contain themselves": (
        pdf(["x"]).replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]"),
        "is a broken PDF",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pdf_without_text_is_one_line(tmp_path, name):
    data, message = CASES[name]
    with pytest.raises(PromptError, match=message) as fault:
        read(tmp_path, data)
    assert "paper.pdf" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_broken_page_is_left_out_and_counted(tmp_path):
    text, notes = read(tmp_path, pdf(["First", deflated_zeros(10**9), "Third"]))
    assert text == "First\n\nThird"
    assert "broken" in notes[0] or "without text" in notes[0]


def test_a_pdf_that_the_context_does_not_hold_is_refused(tmp_path):
    with pytest.raises(PromptTooLongError):
        read(tmp_path, pdf(["many words " * 60] * 4), Context(16, 16))


def test_a_page_gives_its_main_text():
    text, remark = html_text(BLOG.encode(), None, "https://example.org/")
    assert remark == "the main text, without menus"
    for kept in (
        "Why caches miss",
        "recently",
        "    return sum(values) < 3",
        "Conflict misses",
        "L1",
    ):
        assert kept in text
    for left_out in ("Log in", "TRACKING", "color:red", "Accept all", "Popular posts", "Privacy"):
        assert left_out not in text


@pytest.mark.parametrize(
    ("data", "charset"),
    [
        ("<p>caf\u00e9 au lait".encode("latin-1"), "iso-8859-1"),
        ("<meta charset=iso-8859-1><p>caf\u00e9 au lait".encode("latin-1"), None),
        ("<p>caf\u00e9 au lait".encode(), "no-such-charset"),
    ],
)
def test_a_page_is_read_in_its_charset(data, charset):
    assert "caf\u00e9 au lait" in html_text(data, charset, "page")[0]


def test_a_page_that_a_program_fills_is_one_line():
    page = b"<html><script src=x.js></script><div id=root></div></html>"
    with pytest.raises(PromptError, match="has no text") as fault:
        html_text(page, None, "https://example.org/")
    assert "JavaScript" in (fault.value.hint or "")


def test_without_the_package_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("mixchat.chat.documents.document.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs the package pypdf") as fault:
        pdf_text(pdf(["x"]), "paper.pdf", 100)
    assert fault.value.hint == "Install it: pip install 'mixchat[files]'"
