// A chat with the model of this server, by the API that every other client uses.

import { deleteChat, deleteChats, listChats, newChat, readChat, saveChat } from "./chats.js";
import { draw } from "./markdown.js";

const find = (selector) => document.querySelector(selector);
const turns = find("#turns"), question = find("#question"), models = find("#models");
const LOST = "The server does not answer. Is 'mixchat serve' still running?";
const WRONG_KEY = "This is not the server's key. Check it, and enter it again.";
const FULL = "This browser has no room for the chat, so it is lost with this tab. Delete old chats.";
const LONGEST_SPOKEN = 2_000; // characters of an answer that a screen reader is given

let session = {}; // what this tab keeps: the key
try {
  session = sessionStorage;
} catch {} // the browser keeps nothing
let chat = newChat();
let running = null; // the answer that is on its way: its message and its AbortController
let draft = null; // what stood in the field before the last question was taken into it
let follows = true; // the window follows the end of the answer
let lastScroll = 0;

// ---- the server

const lost = (error) => {
  throw error.name === "AbortError" ? error : new Error(LOST);
};

/** Fetch from this server. Ask for the key if it is missing or wrong. */
async function call(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (session.apiKey) headers.authorization = `Bearer ${session.apiKey}`;
  const response = await fetch(path, { ...options, headers }).catch(lost);
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) askForKey(true);
  const message = body.error?.message || `The server answered with status ${response.status}.`;
  if (response.status !== 401) throw new Error(message);
  throw new Error(session.apiKey ? WRONG_KEY : "");
}

/** The objects of a stream of events, as they come. */
async function* events(response) {
  let text = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

/** Receive the answer to the messages into `reply`, and return a note on it. */
async function receive(own, reply, signal) {
  const asked = own.messages.slice(0, -1).map(({ role, content }) => ({ role, content }));
  if (own.system.trim()) asked.unshift({ role: "system", content: own.system });
  const model = models.value || undefined;
  const body = { model, messages: asked, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", body: JSON.stringify(body), signal };
  let name = model, began = null, reason = null, count = 0;
  for await (const event of events(await call("v1/chat/completions", options))) {
    if (event.error) throw new Error(event.error.message);
    name = event.model || name;
    count = event.usage?.completion_tokens ?? count;
    const [choice] = event.choices || [];
    if (!choice) continue;
    reply.content += choice.delta.content || "";
    reply.reasoning_content += choice.delta.reasoning_content || "";
    if (reply.content || reply.reasoning_content) began ||= performance.now();
    reason = choice.finish_reason || reason;
    drawSoon(reply);
  }
  if (!reason) throw new Error(LOST);
  const seconds = (performance.now() - began) / 1000;
  const notes = [name, `${count} tokens`];
  if (began && count > 1 && seconds > 0) notes.push(`${((count - 1) / seconds).toFixed(1)} a second`);
  if (reason === "length") notes.push("cut off at the limit");
  return notes.join(", ");
}

/** Let the model answer these messages, in place of all that came after them. */
async function answer(asked) {
  const own = chat, before = chat.messages, controller = new AbortController();
  const reply = { role: "assistant", content: "", reasoning_content: "", note: "" };
  own.messages = [...asked, reply];
  setRunning({ reply, controller });
  problem("");
  show();
  toEnd();
  if (asked.length > before.length) keep(own); // or an earlier answer would be lost too early
  try {
    reply.note = await receive(own, reply, controller.signal);
  } catch (error) {
    reply.note = "stopped";
    if (error.name !== "AbortError" && own === chat) problem(error.message);
  }
  if (running?.reply === reply) setRunning(null);
  if (reply.content || reply.reasoning_content) {
    keep(own);
    if (own === chat) announce(reply.content);
  } else {
    own.messages = before;
    const last = asked.at(-1); // to be sent again, unless it was only answered again
    if (own === chat && !before.includes(last)) question.value ||= last.content;
  }
  if (own === chat) show();
}

// ---- the chat on the screen

function element(name, className, text = "") {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  return node;
}

function button(action, text) {
  const node = element("button", action, text);
  node.type = "button";
  node.dataset.action = action;
  return node;
}

/** Draw the chat's messages. Turns that are drawn already stay as they are. */
function show() {
  chat.messages.forEach((message, i) => {
    const old = turns.children[i];
    if (old?.message === message && message !== running?.reply && old.isDone) return;
    const turn = old?.message === message ? old : newTurn(message);
    drawTurn(turn);
    if (!old) turns.append(turn);
    else if (old !== turn) old.replaceWith(turn);
  });
  while (turns.children.length > chat.messages.length) turns.lastChild.remove();
  find("#welcome").hidden = chat.messages.length > 0;
  const [first] = chat.messages;
  document.title = first ? `${first.content.slice(0, 60)} – mixchat` : "mixchat";
}

function newTurn(message) {
  const isQuestion = message.role === "user";
  const turn = element("article", isQuestion ? "turn question" : "turn answer");
  turn.message = message;
  turn.append(element("h2", "unseen", isQuestion ? "Your question" : "Answer"));
  if (!isQuestion) {
    const thinking = turn.appendChild(element("details", "thinking"));
    thinking.append(element("summary", ""), element("div", "thought"));
  }
  turn.append(element("div", "text"));
  const row = turn.appendChild(element("div", "row actions"));
  if (isQuestion) row.append(button("edit", "Edit"));
  else row.append(button("copy", "Copy"), button("again", "Answer again"), element("span", "note"));
  return turn;
}

function drawTurn(turn) {
  const { role, content, reasoning_content: thought = "", note = "" } = turn.message;
  const [text, row] = [".text", ".actions"].map((name) => turn.querySelector(name));
  turn.isDone = turn.message !== running?.reply;
  if (role === "user") {
    text.dir = "auto";
    text.textContent = content;
    return;
  }
  const words = thought.trim().split(/\s+/).length;
  turn.querySelector(".thinking").hidden = !thought;
  const isThinking = !content && !turn.isDone;
  turn.querySelector("summary").textContent = isThinking ? "Thinking …" : `Thought, ${words} words`;
  turn.querySelector(".thought").textContent = thought;
  if (content || thought || turn.isDone) draw(text, content, !turn.isDone);
  else text.replaceChildren(element("p", "waiting", `Waiting for ${models.value || "the model"} …`));
  row.hidden = !turn.isDone;
  turn.querySelector(".note").textContent = note;
}

/** Draw the answer that grows, once in a frame. */
function drawSoon(reply) {
  if (!running || running.reply !== reply) return;
  running.frame ||= requestAnimationFrame(() => {
    if (running?.reply !== reply) return;
    running.frame = null;
    drawTurn(turns.lastChild);
  });
}

function setRunning(answering) {
  const hadFocus = document.activeElement?.matches("#stop, #turns button");
  running = answering;
  find("#send").hidden = Boolean(running);
  find("#stop").hidden = !running;
  if (running) announce("The model answers.");
  if (hadFocus) question.focus({ preventScroll: true }); // its button is gone
}

function problem(text) {
  find("#problem").textContent = text;
}

/** Let a screen reader say a text, once. It does not read an answer token by token. */
function announce(text) {
  const announcer = find("#announcer");
  announcer.textContent = text.slice(0, LONGEST_SPOKEN);
  setTimeout(() => (announcer.textContent = ""), 2000); // it has been given on, and is not text
}

function isAtEnd() {
  return innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
}

function toEnd() {
  follows = true; // also if the text grows
  scrollTo(0, document.documentElement.scrollHeight);
  lastScroll = scrollY;
}

new ResizeObserver(() => follows && toEnd()).observe(turns);

// Only a person scrolls up. Text that grows leaves the window at its place.
addEventListener("scroll", () => {
  if (isAtEnd()) follows = true;
  else if (scrollY < lastScroll) follows = false;
  lastScroll = scrollY;
  find("#down").hidden = isAtEnd();
});

// ---- the chats of this browser

function keep(own) {
  if (!saveChat(own)) return problem(FULL);
  if (own === chat) history.replaceState(null, "", `#${own.id}`);
  listAll();
}

function listAll() {
  const items = listChats().map(({ id, title }) => {
    const item = element("li", ""), link = element("a", "", title), erase = button("delete", "×");
    link.href = `#${id}`;
    link.dir = "auto";
    if (id === chat.id) link.ariaCurrent = "page";
    erase.ariaLabel = `Delete the chat: ${title}`;
    item.append(link, erase);
    return item;
  });
  find("#chats ul").replaceChildren(...items);
  find("#chats .empty").hidden = items.length > 0;
  find("#forget").hidden = !items.length;
}

/** Open the chat that the page's address names, or else a new one. */
function openChat() {
  const id = location.hash.slice(1), { system } = chat;
  running?.controller.abort();
  setRunning(null);
  endEdit();
  chat = readChat(id) || newChat(system);
  if (id && chat.id !== id) history.replaceState(null, "", location.pathname);
  if (chat.messages.at(-1)?.role === "user") {
    question.value = chat.messages.pop().content; // no answer came
  }
  pickModel();
  find("#system-text").value = chat.system;
  turns.replaceChildren();
  problem("");
  markSystem();
  show();
  listAll();
  follows = false;
  // The last turn: its question, if the answer is longer than the window.
  [...turns.querySelectorAll(".question")].at(-1)?.scrollIntoView();
}

function pickModel() {
  if ([...models.options].some(({ value }) => value === chat.model)) models.value = chat.model;
}

function markSystem() {
  find("#system-button").classList.toggle("set", Boolean(chat.system.trim()));
  find("#system-button").textContent = chat.system.trim() ? "System prompt: on" : "System prompt";
}

addEventListener("popstate", openChat);

addEventListener("pagehide", () => {
  if (running?.reply.content || running?.reply.reasoning_content) saveChat(chat);
});

// Another tab changed a chat, maybe this one.
addEventListener("storage", () => {
  const stored = readChat(chat.id);
  const isNews = stored?.saved > chat.saved && stored.messages.at(-1).role === "assistant";
  if (isNews && !running && draft === null) openChat();
  else listAll();
});

find("#chats").addEventListener("click", ({ target }) => {
  if (target.matches("a")) find("#chats").hidePopover();
  if (target.dataset.action !== "delete") return;
  const link = target.parentElement.querySelector("a"), id = link.hash.slice(1);
  if (!confirm(`Delete this chat?\n\n${link.textContent}`)) return;
  deleteChat(id);
  if (id === chat.id) startNew();
  else listAll();
});

find("#forget").addEventListener("click", () => {
  if (!confirm("Delete all chats that this browser keeps?")) return;
  deleteChats();
  startNew();
});

function startNew() {
  history.pushState(null, "", location.pathname);
  openChat();
  question.focus();
}

find("#new").addEventListener("click", startNew);

// ---- asking, and what can be done with an answer

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = question.value.trim();
  if (!content || running) return;
  question.value = "";
  const earlier = draft === null ? chat.messages : chat.messages.slice(0, lastQuestion());
  endEdit();
  answer([...earlier, { role: "user", content }]);
});

question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("#ask").requestSubmit();
  }
});

function lastQuestion() {
  return chat.messages.findLastIndex((message) => message.role === "user");
}

/** Take the last question into the field, to be asked in other words. */
function edit() {
  draft ??= question.value;
  question.value = chat.messages[lastQuestion()].content;
  showEdit(true);
  question.focus();
}

function endEdit() {
  if (draft === null) return;
  question.value = draft;
  draft = null;
  showEdit(false);
}

function showEdit(isOn) {
  find("#editing").hidden = !isOn;
  turns.classList.toggle("editing", isOn);
}

const actions = {
  copy: (target) => copy(target.closest(".turn").message.content, target),
  "copy-code": (target) => copy(target.closest(".code").querySelector("code").textContent, target),
  again: () => answer(chat.messages.slice(0, lastQuestion() + 1)),
  edit,
};

turns.addEventListener("click", ({ target }) => {
  if (!running || target.dataset.action?.startsWith("copy")) actions[target.dataset.action]?.(target);
});

async function copy(text, target) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A browser has no clipboard for pages of another machine without TLS.
    const area = document.body.appendChild(element("textarea", "unseen"));
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
    target.focus();
  }
  target.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (target.textContent = "Copy"), 2000);
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || find(":popover-open")) return;
  if (running) running.controller.abort();
  else endEdit();
});

find("#stop").addEventListener("click", () => running?.controller.abort());
find("#editing button").addEventListener("click", () => {
  endEdit();
  question.focus();
});
find("#down").addEventListener("click", () => {
  toEnd();
  question.focus();
});

find("#system-text").addEventListener("input", (event) => {
  chat.system = event.target.value;
  markSystem();
});
models.addEventListener("change", () => (chat.model = models.value));

// ---- the beginning, and the key

function askForKey(isOn) {
  find("#key").hidden = !isOn;
  find("#ask").hidden = isOn;
  if (isOn) find("#key-field").select();
}

find("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  session.apiKey = find("#key-field").value;
  begin().then(() => question.focus());
});

async function begin() {
  try {
    const { data } = await (await call("v1/models")).json();
    models.replaceChildren(...data.map(({ id }) => new Option(id, id)));
    models.disabled = data.length < 2;
    pickModel();
    find("#welcome").textContent = `Ask ${models.value} something.`;
    askForKey(false);
    problem("");
    if (matchMedia("(hover: hover)").matches) question.focus({ preventScroll: true });
  } catch (error) {
    problem(error.message);
  }
}

history.scrollRestoration = "manual";
find("#app").hidden = false;
openChat();
begin();
