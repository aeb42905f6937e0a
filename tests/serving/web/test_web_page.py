"""The page at `/`: what a browser may load, and what it may ask."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from patience import PATIENCE_S
from raw_http import exchange, request

from mixchat.serving.web import page
from mixchat.serving.web.access import Access

FILES = Path(page.__file__).with_name("page_files")
# The texts' HTML, by the page's own script.
TO_HTML = """
const [folder] = process.argv.slice(1), fs = require("fs");
globalThis.markdownit = require(folder + "/markdown-it.min.js");
const script = encodeURIComponent(fs.readFileSync(folder + "/markdown.js", "utf8"));
import("data:text/javascript," + script).then(({ toHtml }) => {
  const texts = JSON.parse(fs.readFileSync(0, "utf8"));
  console.log(JSON.stringify(texts.map((text) => toHtml(text).join(""))));
});
"""
TEXT_TAGS = {"p", "br", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "strong"}
TEXT_TAGS |= {"em", "s", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}
TEXT_TAGS |= {"a", "div", "span", "button"}
TEXT_ATTRIBUTES = {"href", "title", "target", "rel", "class", "tabindex", "type", "align", "start"}
TEXT_ATTRIBUTES |= {"data-tex", "data-language", "data-action"}
CLASSES = {"code", "row", "scrolls", "formula", "formula display"}
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="the script runs in Node.js")
QUESTION = {"messages": [{"role": "user", "content": "say:well"}]}


def loaded():
    """The paths that the page and its scripts load."""
    texts = [(FILES / name).read_text() for name in ("page.html", "page.js")]
    names = re.findall(r'(?:href=|src=|from )"(?:\./)?([^"#]+)"', str(texts))
    return [f"/{name}" for name in sorted(set(names))]


def test_a_browser_gets_the_page_and_what_it_loads_without_a_key(serve):
    served = serve(Access(key="secret"))
    html = exchange(served, request("/"))
    assert html.headers["content-type"].startswith("text/html")
    assert len(loaded()) == 10
    for path in ["/", *loaded()]:
        response = exchange(served, request(path))
        assert (response.status, len(response.body) > 0) == (200, True)
        policy = response.headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        sources = {source for rule in policy for source in rule.split()[1:]}
        assert sources == {"'none'", "'self'"}
        assert response.headers["x-dns-prefetch-control"] == "off"
    assert exchange(served, request("/v1/models")).status == 401


def test_the_page_may_ask_its_own_server_alone(served):
    own = f"127.0.0.1:{served.port}"
    for origin, host, status in [
        (f"http://{own}", own, 200),
        (f"https://{own}", own, 200),  # a proxy has TLS
        ("http://evil.example", own, 403),
        ("http://evil.example", "evil.example", 403),  # DNS rebinding
    ]:
        asked = request("/v1/chat/completions", QUESTION, origin=origin, host=host)
        assert exchange(served, asked).status == status


def test_other_files_of_its_folder_are_not_served_and_without_the_page_none(serve):
    names = ("markdown-it.LICENSE", "temml.LICENSE", "page_files/page.html", "page.html")
    for path in (*(f"/{name}" for name in names), "/..%2fpage.py"):
        assert exchange(serve(), request(path)).status == 404
    for path in ("/", "/page.js"):
        assert exchange(serve(page=False), request(path)).status == 404


class Elements(HTMLParser):
    """The elements of HTML, each with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.all = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))


def to_html(*texts):
    done = subprocess.run(
        ["node", "-e", TO_HTML, str(FILES)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_a_text_gives_no_html_of_its_own_and_links_only_to_the_web():
    texts = json.loads(Path(__file__).with_name("hostile_texts.json").read_text())
    for html in to_html(*texts, "\n\n".join(texts)):
        for tag, attributes in Elements(html).all:
            assert tag in TEXT_TAGS
            assert set(attributes) <= TEXT_ATTRIBUTES
            assert attributes.get("class", "code") in CLASSES
            assert attributes.get("href", "https://").startswith(("http://", "https://", "mailto:"))


@needs_node
def test_prices_are_no_formulas_and_formulas_are_no_markdown():
    prices, inline, block, nested, code = to_html(
        "It costs $5 and $6, or $HOME and $PATH.",
        r"\(a_1 * b_2 * c_3\) and $x_1$",
        "So:\n\\[\na\n- b\n= c\n\\]\nThen",
        "> - $$\n>   x\n>   $$",
        "`$a$`\n\n    $$b$$",
    )
    assert "formula" not in prices + code
    formulas = [tex["data-tex"] for _, tex in Elements(inline).all if "data-tex" in tex]
    assert formulas == ["a_1 * b_2 * c_3", "x_1"]
    assert [tag for tag, _ in Elements(block).all] == ["p", "div", "p"]
    assert Elements(nested).all[-1] == ("div", {"class": "formula display", "data-tex": "\nx\n"})


@needs_node
def test_headings_of_an_answer_leave_out_no_level():
    """A screen reader's list of headings had gaps."""
    (html,) = to_html("### a\n\n# b\n\n###### c")
    assert [tag for tag, _ in Elements(html).all] == ["h3", "h3", "h4"]


def test_each_library_comes_with_its_licence():
    for library in FILES.glob("*.min.js"):
        notice = library.with_name(library.name.replace(".min.js", ".LICENSE")).read_text()
        assert "Copyright" in notice
        assert "icense" in library.read_text()[:300]
