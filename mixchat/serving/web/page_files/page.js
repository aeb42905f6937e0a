// A chat with the model of this server, by the API that every other client uses.
"use strict";

const find = (selector) => document.querySelector(selector);
const chat = find("#chat"), question = find("#ask textarea");
// It takes no HTML and no scripts from an answer. Pictures would tell their servers of the reader.
const markdown = window.markdownit({ breaks: true }).disable("image");
let messages = JSON.parse(sessionStorage.getItem("messages") || "[]"); // as the API takes them
let running = null; // the AbortController of the answer that is on its way

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function show(message) {
  if (message.role === "user") chat.appendChild(element("div", "user", message.content));
  else new AnswerView(message.content, message.reasoning_content).draw(true);
}

function note(text, className = "note") {
  chat.appendChild(element("p", className, text));
  scrollTo(0, document.body.scrollHeight);
}

function save() {
  sessionStorage.setItem("messages", JSON.stringify(messages));
}

/** Fetch from this server. Ask for the key if it is missing or wrong. */
async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) find("#key").hidden = false;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error ? body.error.message : `the server answered ${response.status}`);
}

/** The objects of a stream of events, as they come. */
async function* events(response) {
  let text = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

/** An answer on the screen, which may grow: its thinking, folded, and its text in Markdown. */
class AnswerView {
  constructor(text = "", thinking = "") {
    this.text = text;
    this.thinking = thinking;
    this.root = chat.appendChild(element("div", "assistant"));
    this.folded = element("details", "");
    this.summary = this.folded.appendChild(element("summary", "", "Thinking …"));
    this.thought = this.folded.appendChild(element("div", ""));
    this.body = this.root.appendChild(element("div", "", "…"));
  }

  add(delta) {
    this.text += delta.content || "";
    this.thinking += delta.reasoning_content || "";
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw(isDone) {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const atEnd = innerHeight + scrollY >= document.body.scrollHeight - 60;
    if (this.thinking && !this.folded.isConnected) this.root.prepend(this.folded);
    this.thought.textContent = this.thinking;
    if (this.text || isDone) {
      this.summary.textContent = `Thinking, ${this.thinking.trim().split(/\s+/).length} words`;
      this.body.innerHTML = markdown.render(this.text);
    }
    if (atEnd) scrollTo(0, document.body.scrollHeight);
  }
}

async function stream(view) {
  const asked = messages.map(({ role, content }) => ({ role, content }));
  const body = { messages: asked, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", body: JSON.stringify(body), signal: running.signal };
  const response = await call("v1/chat/completions", options);
  let began = null, reason = null, usage = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage || usage;
    const [choice] = event.choices || [];
    if (!choice) continue;
    view.add(choice.delta);
    if (view.text || view.thinking) began ||= performance.now();
    reason = choice.finish_reason || reason;
  }
  const seconds = (performance.now() - began) / 1000;
  const count = usage.completion_tokens;
  const rate = count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} a second` : "";
  return `${count} tokens${rate}${reason === "length" ? ", cut off at the limit" : ""}`;
}

async function answer() {
  const asked = messages;
  running = new AbortController();
  setRunning(true);
  const view = new AnswerView();
  let said = "", failed = null;
  try {
    said = await stream(view);
  } catch (error) {
    if (error.name === "AbortError") said = "stopped";
    else failed = error;
  }
  running = null;
  setRunning(false);
  view.draw(true);
  if (asked !== messages) return; // a new chat has begun
  if (view.text || view.thinking) {
    messages.push({ role: "assistant", content: view.text, reasoning_content: view.thinking });
  } else {
    view.root.remove();
    chat.lastChild.remove();
    question.value ||= messages.pop().content; // to be sent again
  }
  save();
  if (failed) note(failed.message, "error");
  else note(said);
}

function setRunning(is) {
  find("#send").hidden = is;
  find("#stop").hidden = !is;
}

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = question.value.trim();
  if (!content || running) return;
  question.value = "";
  messages.push({ role: "user", content });
  show(messages.at(-1));
  save();
  answer();
});

question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("#ask").requestSubmit();
  }
});

find("#stop").addEventListener("click", () => running?.abort());

find("#new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  chat.replaceChildren();
  save();
  question.focus();
});

find("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", find("#key input").value);
  find("#key").hidden = true;
  begin();
});

async function begin() {
  chat.replaceChildren();
  messages.forEach(show);
  try {
    const models = await (await call("v1/models")).json();
    find("#model").textContent = document.title = models.data[0].id;
  } catch (error) {
    note(error.message, "error");
  }
}

begin();
