"""Markdown as models write it, and worse: texts made of all kinds of blocks, by a seed."""

import random

_TYPED = r"""
the expert router sends each token to two of eight 日本語 ✅ 👩‍💻 ❤️ 🇩🇪 é नमस्ते שלום
**bold** *em* ***both*** ~~gone~~ `code` `` a`b `` **open *open `open <think> </think> vector<T>
<b>x</b> a<b>c &amp; &lt; &#65; \(a*b*c\) \[x_1\] $$\frac{a}{b}$$ \( \] \* \_ C:\new
[/INST] [bold] [bold]x[/bold]
[link](http://a.b/c?d=e&f=g) [same](same) ![pic](p.png) [x][y] [1] <http://auto.link> http://bare.link
snake_case_name __init__ 2*3*4 :smile:
https://example.org/a/very/long/address/that/fits/into/no/row/of/a/small/terminal/at/all
"""
# Among them are those that must not reach a terminal, and those that have no width.
WORDS = [*_TYPED.split(), "\u200b", "\u202e", "\x1b[31m", "\x9b2J", "e\u0301", "a\tb"]
CODE = [
    *("def f(x):", "    return x  # why", '    """doc', '"""', "", "", "/* open", "*/ int main("),
    *("    int argc) {", "<b>&amp;</b>", "x" * 90, "s = '日本語 ✅'", "`` `", "- no item"),
    "\ta < [b]",
]
LANGUAGES = ("python", "c", "js", "html", "php", "nonsense", "", "diff", "Python title=x", "json")


def markdown(seed):
    """A text of one to twelve blocks."""
    made = random.Random(seed)
    parts = []
    for _ in range(made.randint(1, 12)):
        parts += [
            made.choice(BLOCKS)(made),
            made.choice(["\n\n", "\n\n", "\n", "\n\n\n", "\n  \n"]),
        ]
    return "".join(parts)[: -1 if made.random() < 0.5 else None]


def sentence(made, most=20):
    return " ".join(made.choices(WORDS, k=made.randint(1, most)))


def paragraph(made):
    return "\n".join(sentence(made) for _ in range(made.randint(1, 4)))


def heading(made):
    return f"{'#' * made.randint(1, 7)} {sentence(made, 6)}"


def underlined(made):
    return f"{sentence(made, 4)}\n{made.choice(['===', '---', '-', '=', '+', '1.'])}"


def fence(made, lines=30):
    mark = made.choice(["```", "~~~", "````", " ```"])
    code = "\n".join(made.choices(CODE, k=made.randint(0, lines)))
    end = made.choice([f"\n{mark}", f"\n{mark}", f"\n{mark}", "\n``", ""])
    return f"{mark}{made.choice(LANGUAGES)}\n{code}{end}"


def indented_code(made):
    return "\n".join("    " + line for line in made.choices(CODE, k=made.randint(1, 5)))


def unfenced_code(made):
    return "\n".join(made.choices(UNFENCED, k=made.randint(1, 6)))


def table(made):
    columns = made.randint(1, 5)
    bars = [made.choice(["---", ":-:", "--:"]) for _ in range(columns)]
    rows = [[sentence(made, 3) for _ in range(columns)] for _ in range(made.randint(1, 4))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], bars, *rows[1:]])


def items(made, depth=0):
    mark = made.choice(["-", "*", "+", "1.", "7)", "10."])
    between = made.choice(["\n", "\n", "\n\n"])
    return between.join(_item(made, mark, depth) for _ in range(made.randint(1, 5)))


def _item(made, mark, depth):
    text = f"{mark} {made.choice(['', '[ ] '])}{sentence(made, 8)}"
    if depth < 3 and made.random() < 0.4:
        inner = made.choice([items, items, fence, quote, paragraph, table])
        content = inner(made, depth + 1) if inner in (items, quote) else inner(made)
        text += made.choice(["\n", "\n\n"]) + content
    return text.replace("\n", "\n" + " " * (len(mark) + 1))


def quote(made, depth=0):
    content = made.choice([paragraph, items, fence, heading])(made)
    if depth < 2 and made.random() < 0.3:
        content += "\n" + quote(made, depth + 1)
    return "> " + content.replace("\n", made.choice(["\n> ", "\n> ", "\n"]))


def other(made):
    return made.choice(OTHERS)


OTHERS = [
    *("---", "***", "-", "|", "#", ">", "```", "| a |\n|--", "- a\n+", "1. 1. 1. x"),
    "+ a\n\n\n  b",
    *("[x]: http://u.v", "[y]: <a b> 'title'", "<div>\n*x*\n</div>", "<!-- no -->", "a\u2028b"),
    *("> " * 25 + "deep", "- " * 15 + "deep", "*" * 50 + "a" + "*" * 50, "\t- tab\n\t\t- tab"),
    "\\[\na *b* \\\\\n\\]",
]
UNFENCED = [
    *("def __init__(self):", "    return x**2 + __x__", "  a = 1", "\tb", "# note", "", "    "),
    *("        deeper", "}", "   three"),
]
BLOCKS = [
    unfenced_code,
    *(paragraph, paragraph, paragraph, heading, underlined, fence, fence, indented_code, table),
    *(items, items, quote, other, other),
]
