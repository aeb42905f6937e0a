"""The page at `/`: what a browser may load, and what it may ask."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from raw_http import exchange, request

from mixchat.serving.web import page
from mixchat.serving.web.access import Access

# As much of a browser as the script needs. It prints what is kept and shown at the end.
PAGE_DOUBLE = """
class Node {
  constructor() { this.parts = []; this.on = {}; this.value = this.innerHTML = ""; }
  appendChild(part) { this.parts.push(part); part.isConnected = true; return part; }
  prepend(part) { this.parts.unshift(part); part.isConnected = true; }
  replaceChildren() { this.parts = []; }
  remove() { this.isGone = true; }
  addEventListener(name, act) { this.on[name] = act; }
  focus() {}
  get lastChild() { return this.parts.at(-1); }
  get text() {
    return this.isGone ? "" : [this.textContent, ...this.parts.map((part) => part.text)].join(" ");
  }
}
const nodes = {}, kept = {};
const sessionStorage = {
  getItem: (name) => kept[name], setItem: (name, value) => kept[name] = value };
const document = {
  querySelector: (name) => nodes[name] ||= new Node(),
  createElement: () => new Node(),
  body: { scrollHeight: 0 },
};
const window = { markdownit: () => ({ disable: () => ({ render: (text) => text }) }) };
const innerHeight = 0, scrollY = 0, scrollTo = () => 0, cancelAnimationFrame = () => 0;
const requestAnimationFrame = () => 1;
const fetch = async (path) => path === "v1/models"
  ? { ok: true, json: async () => ({ data: [{ id: "x" }] }) } : new Response(BODY);
process.on("exit", () => console.log(JSON.stringify([
  JSON.parse(kept.messages), nodes["#chat"].text])));
"""
QUESTION = {"messages": [{"role": "user", "content": "say:well"}]}


def loaded(page):
    """The paths that a page loads."""
    return [f"/{name}" for name in re.findall(r'(?:href|src)="([^"]+)"', page.body.decode())]


def test_a_browser_gets_the_page_and_what_it_loads_without_a_key(serve):
    served = serve(Access(key="secret"))
    page = exchange(served, request("/"))
    assert page.headers["content-type"].startswith("text/html")
    assert len(loaded(page)) == 3
    for path in ["/", *loaded(page)]:
        response = exchange(served, request(path))
        assert (response.status, len(response.body) > 0) == (200, True)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
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


@pytest.mark.parametrize("path", ["/", "/page.js"])
def test_without_the_page_there_is_nothing(serve, path):
    assert exchange(serve(page=False), request(path)).status == 404


def test_other_files_of_its_folder_are_not_served(served):
    for path in ("/markdown-it.LICENSE", "/page_files/page.html", "/..%2fpage.py", "/page.html"):
        assert exchange(served, request(path)).status == 404


@pytest.mark.skipif(shutil.which("node") is None, reason="the script runs in Node.js")
def test_an_answer_that_is_only_thinking_is_shown_and_kept():
    """It was taken away, and the question stood in its field again."""
    delta = {"reasoning_content": "Hm, hm."}
    events = [
        {"choices": [{"delta": delta}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
    ]
    events.append({"choices": [], "usage": {"completion_tokens": 3}})
    body = "".join(f"data: {json.dumps(event)}\n" for event in events)
    script = PAGE_DOUBLE.replace("BODY", json.dumps(body))
    script += Path(page.__file__).with_name("page_files").joinpath("page.js").read_text()
    script += (
        'find("#ask textarea").value = "Why?"; find("#ask").on.submit({ preventDefault() {} });'
    )
    done = subprocess.run(
        ["node"], input=script, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    kept, shown = json.loads(done.stdout)
    assert kept == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm, hm."},
    ]
    assert "Thinking, 2 words" in shown
    assert "3 tokens" in shown
    assert "cut off at the limit" in shown
