// Turns the text of a model into HTML. Nobody can trust that text, so it must stay in its place:
// its own HTML is shown as text, it loads nothing, and its links lead only to the web.

const LONGEST_FORMULA = 2_000; // characters
const LONGEST_CODE = 50_000; // characters, to be coloured

// A "$" begins a formula if no blank follows. Another ends it if no blank is before it, and no
// digit after it, so that "$5 and $6" stay prices. The bound keeps the search for the end short.
const BODY = `([^]{1,${LONGEST_FORMULA}}?)`;
const DISPLAY = String.raw`\$\$${BODY}\$\$|\\\[${BODY}\\\]`;
const INLINE = String.raw`\\\(${BODY}\\\)|\$(?![\s$])([^$\n]{1,${LONGEST_FORMULA}}?)(?<![\s\\])\$(?!\d)`;
const FORMULA = new RegExp(`(?:${DISPLAY}|${INLINE})`, "y");
const FORMULA_BLOCK = new RegExp(String.raw`^(?:${DISPLAY})[ \t]*(?:\n|$)`);

const markdown = globalThis.markdownit({ breaks: true, linkify: true });
markdown.disable("image"); // a picture would tell its server of the reader
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.validateLink = (url) => /^(https?:\/\/|mailto:)/i.test(url);
// Formulas come first, because Markdown would take their backslashes and underscores.
markdown.inline.ruler.before("escape", "formula", readFormula);
const interrupts = { alt: ["paragraph", "reference", "blockquote", "list"] };
markdown.block.ruler.before("fence", "formula_block", readFormulaBlock, interrupts);

function readFormula(state, silent) {
  FORMULA.lastIndex = state.pos;
  const match = FORMULA.exec(state.src);
  if (!match || state.pos + match[0].length > state.posMax) return false;
  if (!silent) addFormula(state, "formula", match);
  state.pos += match[0].length;
  return true;
}

function readFormulaBlock(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  if (!/\$\$|\\\[/.test(state.src.slice(start, start + 2))) return false;
  if (state.sCount[startLine] - state.blkIndent >= 4) return false; // code
  const lastLine = Math.min(endLine, startLine + 100);
  const lines = state.getLines(startLine, lastLine, state.blkIndent, false).trimStart();
  const match = FORMULA_BLOCK.exec(lines);
  if (!match) return false;
  if (silent) return true;
  state.line = startLine + match[0].trimEnd().split("\n").length;
  addFormula(state, "formula_block", match).map = [startLine, state.line];
  return true;
}

function addFormula(state, type, [source, ...bodies]) {
  const token = state.push(type, "", 0);
  token.content = bodies.find(Boolean);
  token.markup = source.trim();
  token.meta = { isDisplay: bodies.indexOf(token.content) < 2 };
  return token;
}

const nearWindow = globalThis.IntersectionObserver && new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      nearWindow.unobserve(target);
      finish(target);
    }
  },
  { rootMargin: "100%" },
);

const { rules } = markdown.renderer, escape = markdown.utils.escapeHtml;

rules.formula = rules.formula_block = (tokens, i) => {
  const { content, markup, meta } = tokens[i];
  const name = meta.isDisplay ? "formula display" : "formula";
  const tag = tokens[i].type === "formula" ? "span" : "div";
  return `<${tag} class="${name}" data-tex="${escape(content)}">${escape(markup)}</${tag}>`;
};

rules.fence = rules.code_block = (tokens, i) => {
  const { content, info } = tokens[i];
  const [language] = info.trim().split(/\s/);
  return `<div class="code"><div class="row"><span>${escape(language || "code")}</span>
    <button type="button" data-action="copy-code">Copy</button></div>
    <pre tabindex="0"><code data-language="${escape(language)}">${escape(content)}</code></pre></div>`;
};

rules.table_open = () => '<div class="scrolls" tabindex="0"><table>';
rules.table_close = () => "</table></div>";

// A style in HTML would break the page's policy.
rules.th_open = rules.td_open = (tokens, i, options, env, renderer) => {
  const style = tokens[i].attrGet("style");
  tokens[i].attrs = style ? [["align", style.split(":")[1]]] : null;
  return renderer.renderToken(tokens, i, options);
};

rules.link_open = (tokens, i, options, env, renderer) => {
  tokens[i].attrSet("target", "_blank");
  tokens[i].attrSet("rel", "noopener noreferrer");
  return renderer.renderToken(tokens, i, options);
};

/** The HTML of a text, a string for each of its blocks. */
export function toHtml(text) {
  const env = {}, tokens = markdown.parse(text, env), blocks = [];
  let start = 0, rank = 2; // the page's own headings are h1 and h2
  tokens.forEach(({ level, nesting, type, tag }, i) => {
    if (type === "heading_open") {
      rank = Math.min(Number(tag[1]) + 2, rank + 1, 6);
      tokens[i].tag = tokens[i + 2].tag = `h${rank}`;
    }
    if (level > 0 || nesting > 0) return; // inside of a block
    blocks.push(markdown.renderer.render(tokens.slice(start, i + 1), markdown.options, env));
    start = i + 1;
  });
  return blocks;
}

/**
 * Draw a text. If it grows, a block that stays the same keeps its elements, and what is selected.
 * The colours and formulas of other texts wait until they are near the window, since they take most
 * of the time in a long chat.
 */
export function draw(root, text, grows) {
  const blocks = toHtml(text);
  blocks.forEach((html, i) => {
    const old = root.children[i];
    if (old?.source === html) return;
    const block = document.createElement("div");
    block.dir = "auto";
    block.source = block.innerHTML = html;
    if (old) old.replaceWith(block);
    else root.append(block);
    for (const node of block.querySelectorAll("code[data-language], .formula")) {
      if (grows) finish(node);
      else nearWindow.observe(node);
    }
  });
  while (root.children.length > blocks.length) root.lastChild.remove();
}

function finish(node) {
  if (node.matches(".formula")) typeset(node);
  else colour(node);
}

function colour(code) {
  const { language } = code.dataset, text = code.textContent;
  if (!globalThis.hljs.getLanguage(language) || text.length > LONGEST_CODE) return;
  code.innerHTML = globalThis.hljs.highlight(text, { language, ignoreIllegals: true }).value;
}

function typeset(formula) {
  const source = formula.textContent;
  const displayMode = formula.matches(".display");
  const options = { displayMode, throwOnError: true, maxSize: [20, 200] }; // em, points
  try {
    globalThis.temml.render(formula.dataset.tex, formula, options);
  } catch {
    formula.textContent = source; // no formula, or one that is not known
  }
}
