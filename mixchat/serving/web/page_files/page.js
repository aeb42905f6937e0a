// A chat with the model of this server, by the API that every other client uses.

import { deleteChat, deleteChats, listChats, newChat, newestEnd, pathTo } from "./chats.js";
import { readChat, saveChat, titleOf, versionsOf } from "./chats.js";
import { linkTo, quoteFile, toJson, toMarkdown } from "./files.js";
import { draw } from "./markdown.js";

const find = (selector) => document.querySelector(selector);
const turns = find("#turns"), question = find("#question"), models = find("#models");
const NO_CHATS = "Your chats will be listed here. This browser alone keeps them.";
const LOST = "The server does not answer. Is 'mixchat serve' still running?";
const WRONG_KEY = "This is not the server's key. Check it, and enter it again.";
const FULL = "This browser has no room for the chat, so it is lost with this tab. Delete old chats.";
const LABELS = { copy: "Copy", again: "Answer again", proceed: "Continue" };
const UNKNOWN_CONTEXT = 100_000; // tokens, until the server has told its own
const TOKEN_BYTES = 4; // of text, about
const LONGEST_SPOKEN = 2_000; // characters of an answer that a screen reader is given

let session = {}; // what this tab keeps: the key, and the text in the field
try {
  session = sessionStorage;
} catch {} // the browser keeps nothing
let chat = newChat();
let running = null; // the answer that is on its way: its message and its AbortController
let edited = null; // the question that is changed
let draft = ""; // what stood in the field before that question was taken into it
let contexts = {}; // the tokens that each model's context holds
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

/** The request for an answer. A beginning of it is continued. */
function requestFor(own, reply) {
  const path = pathTo(reply.content ? reply : reply.parent);
  const messages = path.map(({ role, content }) => ({ role, content }));
  if (own.system.trim()) messages.unshift({ role: "system", content: own.system });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  if (models.value) body.model = models.value;
  if (own.temperature) body.temperature = Number(own.temperature);
  return JSON.stringify(body);
}

/** Receive an answer into `reply`, with a note on it. */
async function receive(own, reply, signal) {
  const options = { method: "POST", body: requestFor(own, reply), signal };
  let name = models.value, began = null, reason = null, usage = {};
  for await (const event of events(await call("v1/chat/completions", options))) {
    if (event.error) throw new Error(event.error.message);
    name = event.model || name;
    usage = event.usage || usage;
    const [choice] = event.choices || [];
    if (!choice) continue;
    const { content = "", reasoning_content: thought = "" } = choice.delta;
    reply.content += content || "";
    reply.reasoning_content += thought || "";
    if (content || thought) began ||= performance.now();
    reason = choice.finish_reason || reason;
    drawSoon(reply);
  }
  if (!reason) throw new Error(LOST);
  const { prompt_tokens: read = 0, completion_tokens: count = 0 } = usage;
  const seconds = (performance.now() - began) / 1000;
  const notes = [name, `${count} tokens`];
  if (began && count > 1 && seconds > 0) notes.push(`${((count - 1) / seconds).toFixed(1)} a second`);
  if (reason === "length") notes.push("cut off at the limit");
  reply.note = notes.join(", ");
  reply.isPartial = reason === "length";
  reply.tokens = read + count;
}

function newMessage(role, parent, content = "") {
  return { role, content, reasoning_content: "", note: "", parent };
}

/** Let the model answer a new question, or one of the chat again. The other versions stay. */
function answer(asked) {
  const isNew = !chat.messages.includes(asked);
  const reply = newMessage("assistant", asked);
  const added = isNew ? [asked, reply] : [reply];
  chat.messages.push(...added);
  return generate(reply, added);
}

/** Let the model answer, in `reply`. Without an answer, take `added` out of the chat again. */
async function generate(reply, added) {
  const own = chat, before = chat.last, controller = new AbortController();
  const length = lengthOf(reply);
  own.last = reply;
  setRunning({ reply, controller });
  problem("");
  show();
  toEnd();
  if (added.length > 1) keep(own); // a question that could be lost
  try {
    await receive(own, reply, controller.signal);
  } catch (error) {
    const hasMore = lengthOf(reply) > length;
    if (hasMore) Object.assign(reply, { note: "stopped", isPartial: true });
    if (error.name !== "AbortError" && own === chat) problem(error.message);
  }
  if (running?.reply === reply) setRunning(null);
  if (lengthOf(reply)) {
    keep(own);
    if (own === chat) announce(reply.content);
  } else {
    takeOut(own, added, before);
  }
  if (own === chat) show();
}

function lengthOf({ content, reasoning_content: thought = "" }) {
  return content.length + thought.length;
}

/** Take messages without an answer out of a chat. A new question is in the field again. */
function takeOut(own, added, before = null) {
  own.messages = own.messages.filter((message) => !added.includes(message));
  own.last = before ?? newestEnd(own, added[0].parent);
  const [{ role, content }] = added;
  if (own !== chat || role !== "user" || question.value.includes(content)) return;
  question.value = [content, question.value].filter(Boolean).join("\n\n");
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
  const path = pathTo(chat.last);
  path.forEach((message, i) => {
    const old = turns.children[i];
    if (old?.message === message && message !== running?.reply && old.isDone) return;
    const turn = old?.message === message ? old : newTurn(message);
    drawTurn(turn);
    if (!old) turns.append(turn);
    else if (old !== turn) old.replaceWith(turn);
  });
  while (turns.children.length > path.length) turns.lastChild.remove();
  find("#welcome").hidden = path.length > 0;
  find("#this-chat").hidden = !path.length;
  document.title = path.length ? `${titleOf(chat).slice(0, 60)} – mixchat` : "mixchat";
  showRoom();
}

/** The tokens that the context has left after the last answer. */
function roomLeft() {
  const used = pathTo(chat.last).findLast(({ tokens }) => tokens > 0)?.tokens ?? 0;
  return Math.max(0, (contexts[models.value] ?? UNKNOWN_CONTEXT) - used);
}

function showRoom() {
  const size = contexts[models.value];
  const percent = Math.floor((100 * roomLeft()) / size);
  find("#room").textContent = size ? `${percent}% of the context left` : "";
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
  const versions = versionsOf(chat, message);
  const number = versions.indexOf(message) + 1;
  if (versions.length > 1) row.append(...versionButtons(number, versions.length));
  if (isQuestion) row.append(button("edit", "Edit"));
  else row.append(...["copy", "again", "proceed"].map((action) => button(action, LABELS[action])));
  if (!isQuestion) row.append(element("span", "note"));
  return turn;
}

/** Buttons to the other versions. After the last one comes the first. */
function versionButtons(number, count) {
  const [earlier, later] = [button("earlier", "‹"), button("later", "›")];
  earlier.ariaLabel = "Earlier version";
  later.ariaLabel = "Later version";
  return [earlier, element("span", "version", `${number} of ${count}`), later];
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
  row.querySelector(".proceed").hidden = !(turn.message.isPartial && content);
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
  const items = listChats(find("#search").value.trim()).map(({ id, title }) => {
    const item = element("li", ""), link = element("a", "", title), erase = button("delete", "×");
    link.href = `#${id}`;
    link.dir = "auto";
    if (id === chat.id) link.ariaCurrent = "page";
    erase.ariaLabel = `Delete the chat: ${title}`;
    item.append(link, erase);
    return item;
  });
  find("#chats ul").replaceChildren(...items);
  const isSearch = Boolean(find("#search").value.trim());
  find("#chats .empty").textContent = isSearch ? "No chat has this text." : NO_CHATS;
  find("#chats .empty").hidden = items.length > 0;
  find("#forget").hidden = isSearch || !items.length;
}

/** Open the chat that the page's address names, or else a new one. */
function openChat() {
  const id = location.hash.slice(1);
  running?.controller.abort();
  setRunning(null);
  endEdit();
  chat = readChat(id) || newChat(chat);
  if (id && chat.id !== id) history.replaceState(null, "", location.pathname);
  if (chat.last?.role === "user") takeOut(chat, [chat.last]); // no answer came
  pickModel();
  find("#system-text").value = chat.system;
  find("#temperature").value = chat.temperature;
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
  const isSet = Boolean(chat.system.trim() || chat.temperature);
  find("#system-button").classList.toggle("set", isSet);
  find("#system-button").textContent = isSet ? "Settings: on" : "Settings";
}

addEventListener("popstate", openChat);

addEventListener("pagehide", () => {
  if (running && lengthOf(running.reply)) {
    Object.assign(running.reply, { note: "stopped", isPartial: true });
    saveChat(chat);
  }
  try {
    session.draft = question.value || draft;
  } catch {} // the storage is full
});

// Another tab changed a chat, maybe this one.
addEventListener("storage", () => {
  const stored = readChat(chat.id);
  const isNews = stored?.saved > chat.saved && stored.last.role === "assistant";
  if (isNews && !running && !edited) openChat();
  else listAll();
});

find("#chats").addEventListener("click", ({ target }) => {
  if (target.matches("li a")) find("#chats").hidePopover();
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
find("#search").addEventListener("input", listAll);

find("#rename").addEventListener("click", () => {
  const name = prompt("The name of this chat", titleOf(chat));
  if (name === null) return;
  chat.name = name.trim();
  keep(chat);
  show();
});

find("#markdown").addEventListener("click", ({ target }) => {
  linkTo(target, toMarkdown(chat), "text/markdown", titleOf(chat), ".md");
});
find("#json").addEventListener("click", ({ target }) => {
  linkTo(target, toJson(chat), "application/json", titleOf(chat), ".json");
});

// ---- asking, and what can be done with an answer

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = question.value.trim();
  if (!content || running) return;
  const parent = edited ? edited.parent : chat.last;
  question.value = "";
  endEdit();
  answer(newMessage("user", parent, content));
});

question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("#ask").requestSubmit();
  }
});

/** Take a question into the field, to be asked in other words. */
function edit(target) {
  const message = messageOf(target);
  endEdit();
  draft = question.value;
  edited = message;
  question.value = message.content;
  showEdit();
  question.focus();
}

function endEdit() {
  if (!edited) return;
  question.value = draft;
  draft = "";
  edited = null;
  showEdit();
}

function showEdit() {
  find("#editing").hidden = !edited;
  for (const turn of turns.children) turn.classList.toggle("edited", turn.message === edited);
}

function messageOf(target) {
  return target.closest(".turn").message;
}

/** Show another version of a message, with what came after it. */
function choose(target, step) {
  const message = messageOf(target), versions = versionsOf(chat, message);
  const chosen = versions.at((versions.indexOf(message) + step) % versions.length);
  endEdit();
  chat.last = newestEnd(chat, chosen);
  show();
  keep(chat);
  const turn = [...turns.children].find((node) => node.message === chosen);
  turn.querySelector(`.${target.dataset.action}`).focus();
}

const actions = {
  copy: (target) => copy(messageOf(target).content, target),
  "copy-code": (target) => copy(target.closest(".code").querySelector("code").textContent, target),
  again: (target) => answer(messageOf(target).parent),
  proceed: (target) => generate(messageOf(target), []),
  earlier: (target) => choose(target, -1),
  later: (target) => choose(target, 1),
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
find("#temperature").addEventListener("input", ({ target }) => {
  chat.temperature = target.validity.valid ? target.value : "";
  markSystem();
});
models.addEventListener("change", () => {
  chat.model = models.value;
  showRoom();
});

// ---- text files

/** Put the texts of files before what stands in the field, as far as the context has room. */
async function attach(files) {
  let text = "";
  problem("");
  try {
    for (const file of files) {
      const used = text.length + question.value.length;
      text += await quoteFile(file, Math.max(0, roomLeft() * TOKEN_BYTES - used));
    }
  } catch (error) {
    problem(error.message);
  }
  question.value = text + question.value;
  question.focus();
}

find("#attach").addEventListener("click", () => find("#files").click());
find("#files").addEventListener("change", async ({ target }) => {
  await attach([...target.files]);
  target.value = ""; // or the same file could not be attached again
});
addEventListener("dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
addEventListener("drop", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault(); // or the browser would leave the page for the file
  attach([...event.dataTransfer.files]);
});

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
    contexts = Object.fromEntries(data.map(({ id, context_size }) => [id, context_size]));
    pickModel();
    showRoom();
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
question.value = session.draft ?? "";
openChat();
begin();
