"""Writes Markdown in which text from data stays text: GitHub's flavour, in tables and outside of them."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*\[\]~#|])")
# Inside a word GitHub leaves an underscore alone, and so names of tasks and methods stay readable in the source.
_EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")


def escape(text: str) -> str:
    """Return `text` on one line, so that GitHub shows it as it is: no markup, HTML, table cell or formula in it."""
    text = html.escape(one_line(text), quote=False)
    text = _EDGE_UNDERSCORE.sub(r"\\_", _SPECIAL.sub(r"\\\1", text))
    # A backslash does not keep GitHub from reading a formula between two dollar signs; an element around it does.
    return text.replace("$", "<span>$</span>")


def code(text: str) -> str:
    """Return `text` as code, on one line, for use outside of tables; a longer fence keeps backticks in it."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    fence = "`" * (longest + 1)
    return f"{fence}{pad}{text}{pad}{fence}"


def one_line(text: str) -> str:
    """Return `text` with every run of white space and control characters as one space."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table; cells are Markdown already, the first `texts` columns are left-aligned, the others right."""
    rule = [":---" if place < texts else "---:" for place in range(len(headings))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, rule, *lines))


def folded(summary: str, body: str) -> str:
    """Return `body` (Markdown) that shows when a reader clicks on `summary` (plain text)."""
    return f"<details>\n<summary>{html.escape(one_line(summary), quote=False)}</summary>\n\n{body}\n\n</details>"
