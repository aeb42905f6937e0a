// The chats that this browser keeps. Each has a key of its own in the browser's storage, so that
// tabs do not overwrite each other's chats. Whatever is read from there may be damaged.
//
// A chat is a tree. Each message has a parent, or null. The versions of an answer or of a question
// have one parent. `last` is the message that ends the branch on the screen.

const PREFIX = "mixchat:chat:";
const LISTED = 200; // chats

/** A chat without a question. It is kept once it is saved. */
export function newChat({ system = "", temperature = "" } = {}) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, saved: 0, system, temperature, model: "", name: "", messages: [], last: null };
}

/** The chat with this id, or null if there is none that can be read. */
export function readChat(id) {
  try {
    const stored = JSON.parse(localStorage.getItem(PREFIX + id));
    const { saved, system, model, messages, last = messages.length - 1 } = stored;
    const { temperature = "", name = "" } = stored;
    const isRight = areTexts(system, model, temperature, name) && messages.every(isMessage);
    if (!isRight || !(saved > 0) || !messages[last]?.role) return null;
    linkParents(messages);
    if (!messages.every(isInTurn)) return null;
    return { id, saved, system, temperature, model, name, messages, last: messages[last] };
  } catch {
    return null; // also if the browser keeps nothing
  }
}

function isMessage(message, i) {
  const { role, content, reasoning_content: thinking = "", note = "", parent = i - 1 } = message;
  const hasParent = Number.isInteger(parent) && parent >= -1 && parent < i;
  return ["user", "assistant"].includes(role) && hasParent && areTexts(content, thinking, note);
}

/** Questions and answers come by turns. */
function isInTurn({ role, parent }) {
  return role !== (parent ? parent.role : "assistant");
}

function areTexts(...values) {
  return values.every((value) => typeof value === "string");
}

/** Put messages in place of their numbers. A message without a number follows the one before. */
function linkParents(messages) {
  messages.forEach((message, i) => (message.parent = messages[message.parent ?? i - 1] || null));
}

/** Keep a chat, and return whether that worked. If another tab changed it, keep it as a new one. */
export function saveChat(chat) {
  const stored = readChat(chat.id);
  if (stored && stored.saved !== chat.saved) chat.id = newChat().id;
  const saved = Date.now();
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify({ ...withNumbers(chat), saved }));
  } catch {
    return false; // the storage is full, or the browser keeps nothing
  }
  chat.saved = saved;
  return true;
}

/** The chat as it is stored: numbers in place of parents, and no answer that has not begun. */
function withNumbers(chat) {
  const begun = chat.messages.filter((message) => message.content || message.reasoning_content);
  const numbers = new Map(begun.map((message, i) => [message, i]));
  const numberOf = (message) => numbers.get(message) ?? -1;
  const messages = begun.map((message) => ({ ...message, parent: numberOf(message.parent) }));
  return { ...chat, messages, last: numbers.get(chat.last) ?? numbers.get(chat.last.parent) };
}

/** The messages from the first question to this message. */
export function pathTo(message) {
  const path = [];
  for (let step = message; step; step = step.parent) path.push(step);
  return path.reverse();
}

/** A message and those that were said in its place. */
export function versionsOf(chat, message) {
  return chat.messages.filter(({ parent }) => parent === message.parent);
}

/** The end of the newest branch that goes through a message, or of all branches. */
export function newestEnd(chat, message) {
  const next = chat.messages.findLast(({ parent }) => parent === message);
  return next ? newestEnd(chat, next) : message;
}

/** The newest chats with a text in them first, each with its id and title. */
export function listChats(text = "") {
  const chats = storedIds().map(readChat).filter(Boolean).filter((chat) => hasText(chat, text));
  chats.sort((one, other) => other.saved - one.saved);
  return chats.slice(0, LISTED).map((chat) => ({ id: chat.id, title: titleOf(chat) }));
}

function hasText({ name, messages }, text) {
  const texts = [name, ...messages.map(({ content }) => content)];
  return texts.some((own) => own.toLowerCase().includes(text.toLowerCase()));
}

/** The name that a person gave to a chat, or else the beginning of its first question. */
export function titleOf({ name, messages }) {
  return name.trim().slice(0, 80) || messages[0]?.content.trim().slice(0, 80) || "Chat";
}

export function deleteChat(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Delete all chats, also damaged ones. */
export function deleteChats() {
  storedIds().forEach(deleteChat);
}

function storedIds() {
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
    return keys.map((key) => key.slice(PREFIX.length));
  } catch {
    return [];
  }
}
