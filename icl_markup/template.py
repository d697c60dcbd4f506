"""Templates: how a prompt is composed from tags, literal words and fields.

A template is a small text file. ``#`` begins a comment line; ``@tag`` declares a tag, with its width in soft
tokens and the description it is initialised from; the other ``@`` lines open a section:

    @tag <demo> width=2 "an example"
    @head                       once, before everything
    @option                     once for each option:         fields {symbol} {name} {description}
     {symbol}: {name}
    @demo                       once for each demonstration:  fields {text} {label}
    <demo> <input> {text} <label> {label}
    @query                      for the text to classify:     fields {text} {label}; {label} is the slot
    <demo> <input> {text} <label> {label}
    @tail                       once, after everything

``@head`` and ``@tail`` may use ``{task}``, the task's description. A line break or a run of spaces is one
space; spaces before a tag and after a newline are layout and vanish. ``\\n`` writes a newline, ``\\t`` a tab, and
``\\s`` a space that stays, so that in ``\\n\\s{name}`` the name has the tokens that it has after a word; a backslash
before ``< { @ # \\`` writes that character itself. A template without tags is a prompt in plain words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal as OneOf

from icl_markup.errors import TemplateError, nearest
from icl_markup.tags import Tag

SECTIONS = ("head", "option", "demo", "query", "tail")
FIELDS: dict[str, frozenset[str]] = {
    "head": frozenset({"task"}),
    "option": frozenset({"symbol", "name", "description"}),
    "demo": frozenset({"text", "label"}),
    "query": frozenset({"text", "label"}),
    "tail": frozenset({"task"}),
}
_REQUIRED = {"option": ("name",), "demo": ("text", "label"), "query": ("text", "label")}

_TAG_LINE = re.compile(r'@tag\s+(<[^<>\s]*>)(?:\s+width=(\S+))?(?:\s+"([^"]*)")?\s*$')
_TAG_NAME = re.compile(r"<[A-Za-z][A-Za-z0-9_-]*>")
_PIECE = re.compile(
    r"(?P<escape>\\.)|(?P<tag><[A-Za-z][A-Za-z0-9_-]*>)|(?P<field>\{[^{}]*\})|(?P<brace>[{}])|(?P<slash>\\$)"
    r"|(?P<text>[^\\<{}]+|<)"
)
_PROTECTED = {"\\n": "\0", "\\t": "\1", "\\s": "\2"}
_ESCAPES = {
    "\\n": "\n",
    "\\t": "\t",
    "\\s": " ",
    "\\\\": "\\",
    "\\<": "<",
    "\\{": "{",
    "\\}": "}",
    "\\@": "@",
    "\\#": "#",
}


@dataclass(frozen=True)
class Node:
    """A part of a section: a tag's name, a field's name, or literal text (spaces already settled)."""

    kind: OneOf["tag", "field", "text"]
    value: str


@dataclass(frozen=True)
class Template:
    """A parsed template; `source` is the text it was parsed from, and parses to the same template again."""

    name: str
    source: str
    tags: tuple[Tag, ...]
    head: tuple[Node, ...]
    option: tuple[Node, ...]
    demo: tuple[Node, ...]
    query: tuple[Node, ...]
    tail: tuple[Node, ...]

    @classmethod
    def parse(cls, source: str, name: str = "template") -> Template:
        """Parse the text of a template.

        Raises:
            TemplateError: the text is malformed; the message begins with ``name:line:column``.
        """
        return _Parser(source, name).parse()

    @classmethod
    def load(cls, name_or_path: str | Path) -> Template:
        """Load a template that ships inside the package by its name, or any by its path.

        Raises:
            TemplateError: there is no such template, or it is malformed.
        """
        path = Path(name_or_path)
        if path.suffix == ".tmpl" or path.is_file():
            if not path.is_file():
                raise TemplateError(f"{path}: no such template file")
            try:
                return cls.parse(path.read_text(encoding="utf-8"), str(path))
            except UnicodeDecodeError as error:
                raise TemplateError(f"{path}: not UTF-8 text ({error})") from error
        shipped = resources.files("icl_markup") / "templates" / f"{name_or_path}.tmpl"
        if not shipped.is_file():
            known = shipped_templates()
            raise TemplateError(
                f"no template {str(name_or_path)!r}{nearest(str(name_or_path), known)}; the package ships "
                f"{', '.join(known)}; the path of a file of your own ends in .tmpl"
            )
        return cls.parse(shipped.read_text(encoding="utf-8"), str(name_or_path))

    def with_width(self, width: int | Mapping[str, int]) -> Template:
        """Return the template with every tag of another width, or with those of a mapping from names to widths.

        Raises:
            TemplateError: a width is not from 1 to 1000.
        """
        widths = {t.name: width for t in self.tags} if isinstance(width, int) else width
        declaration = re.compile(r"^(\s*@tag\s+(<[^<>\s]*>))(?:\s+width=\S+)?")

        def widened(found: re.Match[str]) -> str:
            return f"{found[1]} width={widths[found[2]]}" if found[2] in widths else found[0]

        lines = self.source.splitlines()
        return Template.parse("\n".join(declaration.sub(widened, line) for line in lines) + "\n", self.name)

    def without_tag(self, name: str) -> Template:
        """Return the template with a tag taken out wherever it stands.

        Raises:
            TemplateError: the template has no such tag.
        """
        self._check_known(name)
        lines = [line for line in self.source.splitlines() if not re.match(rf"\s*@tag\s+{re.escape(name)}(\s|$)", line)]
        return self._with_names({name: ""}, lines)

    def renamed(self, names: Mapping[str, str]) -> Template:
        """Return the template with other names for some tags, all of them given at the same time.

        Args:
            names: new names by old ones.

        Raises:
            TemplateError: the template lacks a tag, a new name is none, or two tags would have one name.
        """
        for name in names:
            self._check_known(name)
        return self._with_names(names, self.source.splitlines())

    def _check_known(self, name: str) -> None:
        known = [tag.name for tag in self.tags]
        if name not in known:
            raise TemplateError(f"template {self.name!r} has no tag {name}{nearest(name, known)}")

    def _with_names(self, names: Mapping[str, str], lines: list[str]) -> Template:
        # An escape is passed over, so that the characters of `\<demo>` stay what they are.
        tag = re.compile("|".join([r"\\.", *map(re.escape, names)]))

        def exchanged(line: str) -> str:
            if line.lstrip().startswith("#"):
                return line
            declared = re.match(r"\s*@tag\s+<[^<>\s]*>", line)
            end = declared.end() if declared else len(line)  # what follows a declared name is width and description
            return tag.sub(lambda found: names.get(found[0], found[0]), line[:end]) + line[end:]

        return Template.parse("\n".join(map(exchanged, lines)) + "\n", self.name)

    @property
    def is_plain(self) -> bool:
        """Whether the template has no tags."""
        return not self.tags

    @property
    def shows_symbols(self) -> bool:
        """Whether options are shown with a symbol (A, B, C …) that can be the answer."""
        return Node("field", "symbol") in self.option


def shipped_templates(prefix: str = "") -> list[str]:
    """Return the names of the templates inside the package that begin with `prefix`, sorted."""
    folder = resources.files("icl_markup") / "templates"
    names = (item.name.removesuffix(".tmpl") for item in folder.iterdir() if item.name.endswith(".tmpl"))
    return sorted(name for name in names if name.startswith(prefix))


class _Parser:
    def __init__(self, source: str, name: str):
        self.source = source
        self.name = name
        self.tags: dict[str, Tag] = {}
        self.declared: dict[str, int] = {}
        self.used: set[str] = set()
        self.sections: dict[str, list[Node]] = {}
        self.opened: dict[str, int] = {}

    def parse(self) -> Template:
        current: str | None = None
        for number, line in enumerate(self.source.splitlines(), start=1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            if stripped.startswith("@tag"):
                self._declare(stripped, number, line)
            elif stripped.startswith("@"):
                current = self._open(stripped, number, line)
            elif current is None:
                raise self._error(
                    number, 1, "text before the first section; begin with @head, @option, @demo or @query"
                )
            else:
                self._nodes(current, line, number)
        self._check_complete()
        settled = {section: _settle_spaces(self.sections.get(section, [])) for section in SECTIONS}
        return Template(self.name, self.source, tuple(self.tags.values()), **settled)

    def _error(self, line: int, column: int, message: str) -> TemplateError:
        return TemplateError(f"{self.name}:{line}:{column}: {message}")

    def _declare(self, text: str, number: int, line: str) -> None:
        column = line.index("@") + 1
        match = _TAG_LINE.match(text)
        if match is None:
            raise self._error(number, column, 'expected: @tag <name> width=2 "description"')
        name, width, description = match.groups()
        column = line.index(name) + 1
        if not _TAG_NAME.fullmatch(name):
            raise self._error(number, column, f"{name} is no tag name; use <, a letter, letters, digits, - or _, and >")
        if name in self.tags:
            raise self._error(number, column, f"tag {name} is declared twice")
        if width is not None and not (re.fullmatch(r"0*[0-9]{1,4}", width) and 1 <= int(width[-4:]) <= 1000):
            raise self._error(number, line.index("width=") + 1, f"width={width[:20]} is no whole number from 1 to 1000")
        self.declared[name] = number
        self.tags[name] = Tag(name, int((width or "1")[-4:]), description or name.strip("<>"))

    def _open(self, text: str, number: int, line: str) -> str:
        section = text[1:]
        column = line.index("@") + 1
        if section not in SECTIONS:
            hint = nearest(section, [*SECTIONS, "tag"])
            raise self._error(number, column, f"unknown section {text!r}{hint}; write \\@ for an @ that begins a line")
        if section in self.sections:
            raise self._error(number, column, f"section @{section} stands twice")
        self.sections[section] = []
        self.opened[section] = number
        return section

    def _nodes(self, section: str, line: str, number: int) -> None:
        nodes = self.sections[section]
        if nodes:
            nodes.append(Node("text", " "))
        for match in _PIECE.finditer(line):
            piece, column = match.group(), match.start() + 1
            if match["tag"]:
                if piece not in self.tags:
                    hint = nearest(piece, self.tags)
                    raise self._error(number, column, f"tag {piece} is not declared{hint}; add @tag, or write \\<")
                self.used.add(piece)
                nodes.append(Node("tag", piece))
            elif match["field"]:
                name = piece[1:-1].strip()
                if name not in FIELDS[section]:
                    allowed = ", ".join(f"{{{f}}}" for f in sorted(FIELDS[section]))
                    hint = nearest(name, FIELDS[section])
                    raise self._error(number, column, f"@{section} has no field {piece}{hint}; it has {allowed}")
                if Node("field", name) in nodes and section in ("demo", "query"):
                    raise self._error(number, column, f"{piece} stands twice in @{section}")
                nodes.append(Node("field", name))
            elif match["escape"]:
                if piece not in _ESCAPES:
                    raise self._error(number, column, f"unknown escape {piece}; known are {' '.join(_ESCAPES)}")
                # White space that was asked for is no layout: it is marked until the spaces are settled.
                nodes.append(Node("text", _PROTECTED.get(piece) or _ESCAPES[piece]))
            elif match["text"]:
                nodes.append(Node("text", piece))
            else:
                raise self._error(number, column, f"a lone {piece}; write \\{piece} for the character itself")

    def _check_complete(self) -> None:
        last = self.source.count("\n") + 1
        for section, required in _REQUIRED.items():
            if section not in self.sections:
                raise self._error(last, 1, f"section @{section} is missing")
            for name in required:
                if Node("field", name) not in self.sections[section]:
                    raise self._error(self.opened[section], 1, f"@{section} lacks the field {{{name}}}")
        for unused in (name for name in self.tags if name not in self.used):
            raise self._error(self.declared[unused], 1, f"tag {unused} is declared but not used")


def _settle_spaces(nodes: list[Node]) -> tuple[Node, ...]:
    """Merge literal text, fold runs of white space to one space, and drop the spaces before a tag and at the end."""
    merged: list[Node] = []
    for node in nodes:
        joins = node.kind == "text" and merged and merged[-1].kind == "text"
        merged.append(Node("text", merged.pop().value + node.value) if joins else node)
    settled = []
    for index, node in enumerate(merged):
        if node.kind == "text":
            text = re.sub(r"[ \t]+", " ", node.value)
            if index + 1 < len(merged) and merged[index + 1].kind == "tag":
                text = text.rstrip(" ")
            if index + 1 == len(merged):
                text = text.rstrip(" ")
            text = text.replace("\0 ", "\0").replace("\0", "\n").replace("\1", "\t").replace("\2", " ")
            if text:
                settled.append(Node("text", text))
        else:
            settled.append(node)
    return tuple(settled)
