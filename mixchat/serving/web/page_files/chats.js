// The chats that this browser keeps. Each has a key of its own in the browser's storage, so that
// tabs do not overwrite each other's chats. Whatever is read from there may be damaged.

const PREFIX = "mixchat:chat:";
const LISTED = 200; // chats

/** A chat without a question. It is kept once it is saved. */
export function newChat(system = "", model = "") {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, saved: 0, system, model, messages: [] };
}

/** The chat with this id, or null if there is none that can be read. */
export function readChat(id) {
  try {
    const { saved, system, model, messages } = JSON.parse(localStorage.getItem(PREFIX + id));
    const isRight = areTexts(system, model) && messages.length > 0 && messages.every(isMessage);
    return isRight && saved > 0 ? { id, saved, system, model, messages } : null;
  } catch {
    return null; // also if the browser keeps nothing
  }
}

function isMessage(message) {
  const { role, content, reasoning_content: thinking = "", note = "" } = message;
  return ["user", "assistant"].includes(role) && areTexts(content, thinking, note);
}

function areTexts(...values) {
  return values.every((value) => typeof value === "string");
}

/** Keep a chat, and return whether that worked. If another tab changed it, keep it as a new one. */
export function saveChat(chat) {
  const stored = readChat(chat.id);
  if (stored && stored.saved !== chat.saved) chat.id = newChat().id;
  const messages = chat.messages.filter((message) => message.content || message.reasoning_content);
  const saved = Date.now();
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify({ ...chat, saved, messages }));
  } catch {
    return false; // the storage is full, or the browser keeps nothing
  }
  chat.saved = saved;
  return true;
}

/** The newest chats first, each with its id and title. */
export function listChats() {
  const chats = storedIds().map(readChat).filter(Boolean);
  chats.sort((one, other) => other.saved - one.saved);
  return chats.slice(0, LISTED).map(({ id, messages }) => ({ id, title: titleOf(messages) }));
}

function titleOf([{ content }]) {
  return content.trim().slice(0, 80) || "Chat";
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
