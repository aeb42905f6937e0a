// Text files that a person attaches, and chats that a person takes away as files.

import { pathTo, titleOf } from "./chats.js";

/** The text of a file, in a block of its own. Throws an error of one line. `room` is in bytes. */
export async function quoteFile(file, room) {
  if (file.size > room) {
    const sizes = [file.size, room].map(inKilobytes);
    const problem = `${file.name} has ${sizes[0]}, and there is room for about ${sizes[1]}.`;
    throw new Error(`${problem} Attach less, or begin a new chat.`);
  }
  const text = await readText(file);
  const fence = fenceFor(text);
  return `${file.name}:\n${fence}\n${text.trimEnd()}\n${fence}\n\n`;
}

function inKilobytes(size) {
  return `${Math.ceil(size / 1000).toLocaleString("en")} kB`;
}

async function readText(file) {
  const bytes = await file.arrayBuffer().catch(() => {
    throw new Error(`${file.name} cannot be read. Attach a text file.`);
  });
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    if (!text.includes("\0")) return text.replaceAll("\r\n", "\n");
  } catch {} // no UTF-8
  throw new Error(`${file.name} is not text in UTF-8. Attach text files only.`);
}

/** A fence that does not occur in a text. */
function fenceFor(text) {
  let fence = "```";
  while (text.includes(fence)) fence += "`";
  return fence;
}

/** The branch on the screen as Markdown. */
export function toMarkdown(chat) {
  const system = chat.system.trim() ? [`## System prompt\n\n${chat.system.trim()}`] : [];
  const turns = pathTo(chat.last).map(({ role, content }) => {
    return `## ${role === "user" ? "Question" : "Answer"}\n\n${content.trim()}`;
  });
  return [`# ${titleOf(chat)}`, ...system, ...turns].join("\n\n") + "\n";
}

/** The branch on the screen as JSON, in the form that the API takes. */
export function toJson(chat) {
  const system = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  const turns = pathTo(chat.last).map(({ role, content }) => ({ role, content }));
  const fields = { title: titleOf(chat), model: chat.model || undefined };
  return JSON.stringify({ ...fields, messages: [...system, ...turns] }, null, 2) + "\n";
}

/** Let a link lead to a text that the browser has, which needs no server. */
export function linkTo(link, text, type, title, ending) {
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = title.replace(/[^\p{L}\p{N} _-]+/gu, "_").slice(0, 60) + ending;
}
