"""Where exported tags lie: soft tokens as ordinary tokens of an ordinary vocabulary.

Inside this package tag ids begin beyond the vocabulary's rows and no text can spell them. Other tools want a tokenizer
that knows them. A tag of several soft tokens becomes several tokens, ``<demo>`` and ``<demo:1>``: its written form is
``<demo><demo:1>``. A tag's name cannot hold a colon, so no two tags collide; a name that the tokenizer has already is
given another form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from icl_markup.errors import ExportError, PromptError
from icl_markup.tags import Tag, TagTable


@dataclass(frozen=True)
class Placement:
    """The tokens and ids of exported tags.

    Attributes:
        first_id: the first id of the tags in this package, from which `moved` translates.
        tokens: each tag's tokens, one a soft token, in the order of the tag table.
        token_ids: their ids in the exported vocabulary.
    """

    first_id: int
    tokens: Mapping[str, tuple[str, ...]]
    token_ids: Mapping[str, tuple[int, ...]]

    def ids(self, name: str) -> list[int]:
        """Return the ids of a tag's soft tokens in the exported vocabulary.

        Raises:
            PromptError: there is no such tag.
        """
        if name not in self.token_ids:
            raise PromptError(f"no tag {name}; exported are {', '.join(self.token_ids)}")
        return list(self.token_ids[name])

    def text(self, name: str) -> str:
        """Return a tag's written form: its tokens, one after the other."""
        return "".join(self.tokens[name])

    @property
    def all_ids(self) -> list[int]:
        """All tags' ids, in the order of the tag table's rows."""
        return [i for ids in self.token_ids.values() for i in ids]

    def moved(self, ids: Iterable[int]) -> list[int]:
        """Translate the ids of a prompt of this package into the exported vocabulary."""
        placed, first = self.all_ids, self.first_id
        return [placed[i - first] if 0 <= i - first < len(placed) else i for i in ids]

    def to_json(self, tags: Sequence[Tag]) -> list[dict[str, Any]]:
        """Return one JSON-able entry a tag."""
        return [
            {
                "name": tag.name,
                "description": tag.description,
                "tokens": list(self.tokens[tag.name]),
                "ids": list(self.token_ids[tag.name]),
            }
            for tag in tags
        ]

    @classmethod
    def from_json(cls, entries: Any, first_id: int) -> Placement:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: the data is not that.
        """
        return cls(
            first_id,
            {str(entry["name"]): tuple(map(str, entry["tokens"])) for entry in entries},
            {str(entry["name"]): tuple(map(int, entry["ids"])) for entry in entries},
        )


def place_tags(tokenizer: PreTrainedTokenizerBase, table: TagTable) -> tuple[Placement, PreTrainedTokenizerBase]:
    """Add the tags to a copy of a tokenizer; the ids are those that it gives them, after all that it has.

    The tokens are special ones: matched as they are written, before any normalisation, and left out where
    ``skip_special_tokens`` asks for it.

    Raises:
        ExportError: the tokenizer does not encode a tag's written form to the tag's ids.
    """
    taken = set(tokenizer.get_vocab())
    names: dict[str, tuple[str, ...]] = {}
    for tag in table.tags:
        names[tag.name] = _token_names(tag, taken)
        taken |= set(names[tag.name])
    extended = copy.deepcopy(tokenizer)
    new = [AddedToken(token, special=True, normalized=False) for tokens in names.values() for token in tokens]
    extended.add_tokens(new, special_tokens=True)
    ids = {name: tuple(extended.convert_tokens_to_ids(list(tokens))) for name, tokens in names.items()}
    placement = Placement(table.first_id, names, ids)
    check_tokenizer(extended, placement)
    return placement, extended


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, placement: Placement) -> None:
    """Check that a tokenizer encodes every tag's written form to exactly its ids, alone and between words.

    Raises:
        ExportError: it does not.
    """
    for name, ids in placement.token_ids.items():
        for text in (placement.text(name), f"a{placement.text(name)}a", f"a {placement.text(name)} a"):
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            if [i for i in found if i in set(ids)] != list(ids):
                raise ExportError(
                    f"tag {name}: the tokenizer of {tokenizer.name_or_path!r} encodes {text!r} to {found}, which is "
                    f"not the tag's {list(ids)}; rename the tag in its template"
                )
    if len(set(placement.all_ids)) < len(placement.all_ids):
        raise ExportError("two tags were given one id by the tokenizer; rename one of them in the template")


def _token_names(tag: Tag, taken: set[str]) -> tuple[str, ...]:
    stem = tag.name.removesuffix(">")
    for attempt in count():
        mark = "" if attempt == 0 else f":tag{attempt}"
        tokens = [f"{stem}{mark}>", *(f"{stem}{mark}:{i}>" for i in range(1, tag.width))]
        if not taken & set(tokens):
            break
    return tuple(tokens)
