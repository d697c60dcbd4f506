"""What a causal model has computed of prompts, kept for later calls: keys and values of the ids they begin with."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from icl_markup.batching import Batch
from icl_markup.packing import Prefix, Tree, attention_of, grow
from icl_markup.tags import TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone

MOST_BYTES = 2**30
MOST_ENTRIES = 256
"""The most prefixes that are kept, however small: every one is compared with where none begins a prompt whole."""

UNBOUNDED = 2**62


@dataclass
class Counts:
    """What a cache has saved.

    Attributes:
        hits: prefixes that were asked for and there, whole.
        misses: prefixes that were asked for, and a part of which or all had to be computed.
        computed: tokens of prefixes that were computed.
        reused: tokens that prompts began with and that were not computed for them.
    """

    hits: int = 0
    misses: int = 0
    computed: int = 0
    reused: int = 0


class PrefixCache:
    """Keys and values of prefixes, those dropped first that have not been used for longest.

    They hold for one state of the model and of the tags' table: where a table's rows have changed, its prefixes are
    dropped, and where a weight was written to or replaced, all are. Only what changes the model by other means (its
    configuration, a hook, a write through ``Tensor.data``) is not noticed, and calls for `clear`.

    Whether a model's answers with a cache are those to the whole prompt is found out at first use, on a short input.

    Args:
        most_bytes: the most bytes that kept keys and values take; 0 keeps none.

    Attributes:
        counts: what was saved so far.
        obstacle: why prompts are computed whole, empty if they are not or if that has not been found out yet.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self.counts = Counts()
        self.obstacle = ""
        self._entries: OrderedDict[tuple[bytes, tuple[int, ...]], Prefix] = OrderedDict()
        self._bytes = 0
        self._limit: int | None = None
        self._weights: tuple[tuple[int, int], ...] = ()
        self._digests: WeakKeyDictionary[TagTable, bytes] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """The bytes that kept keys and values take."""
        return self._bytes

    def clear(self) -> None:
        """Drop every prefix; counts stay."""
        self._entries.clear()
        self._bytes = 0

    def limit(self, backbone: Backbone) -> int:
        """Return the longest prompt in tokens that a backbone answers with a cache as it does without; 0: none."""
        if backbone.kind != "causal" or attention_of(backbone) not in ("eager", "sdpa"):
            return 0
        if self._limit is None:
            self.obstacle = _obstacle(backbone)
            self._limit = 0 if self.obstacle else _longest_exact(backbone.model.config)
        return self._limit

    def state(self, backbone: Backbone, table: TagTable | None) -> bytes:
        """Return a key of what a table holds; drop what was computed for other rows of it, or other weights."""
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else int(p._version)) for p in backbone.model.parameters())
        if weights != self._weights:
            self.clear()
            self._weights = weights
        if table is None:
            return b""
        digest = hashlib.blake2b(table.rows.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        before = self._digests.get(table, digest)
        if before != digest:
            for key in [key for key in self._entries if key[0] == before]:
                self._drop(key)
        self._digests[table] = digest
        return digest

    def holds(self, state: bytes, ids: tuple[int, ...]) -> bool:
        """Return whether a prefix is kept."""
        return (state, ids) in self._entries

    def longest(self, state: bytes, ids: tuple[int, ...]) -> Prefix | None:
        """Return the longest beginning of `ids` that is kept, a part of a prefix perhaps; None where none is."""
        key = (state, ids)
        if key not in self._entries:
            best = 0
            for candidate in self._entries:
                if candidate[0] == state and candidate[1][: best + 1] == ids[: best + 1]:
                    length = common(candidate[1], ids)
                    if length > best:
                        key, best = candidate, length
            if not best:
                return None
        self._entries.move_to_end(key)
        return self._entries[key].head(common(key[1], ids))

    def keep(self, state: bytes, prefix: Prefix) -> None:
        """Keep a prefix, and drop others to make room; one that is larger than all room is not kept."""
        key = (state, prefix.ids)
        if prefix.bytes > self.most_bytes or key in self._entries:
            return
        self._entries[key] = prefix
        self._bytes += prefix.bytes
        while self._bytes > self.most_bytes or len(self._entries) > MOST_ENTRIES:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[bytes, tuple[int, ...]]) -> None:
        self._bytes -= self._entries.pop(key).bytes


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _longest_exact(config: Any) -> int:
    """Return the longest sequence in which every layer sees all that is before a token, at one and the same angle.

    Layers that see a window, or the chunk that a token is in, see all of what is not longer. Rotary embeddings whose
    angles depend on the length of the whole prompt do not, up to the length that a model was trained for.
    """
    text = config.get_text_config()
    limits = [UNBOUNDED]
    for name, value in text.to_dict().items():
        sees = ("window" in name or "chunk" in name) and not name.endswith(("layers", "pattern"))
        if sees and type(value) is int and value > 0:
            limits.append(value)
    for rope in _ropes(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)):
        if any(word in str(rope.get("rope_type", rope.get("type"))) for word in ("dynamic", "longrope")):
            trained = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limits.append((trained or text.max_position_embeddings) - 1)
    return min(limits)


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the parameters of each rotary embedding; some models have one for each type of layer."""
    if isinstance(parameters, Mapping):
        yield parameters
        for value in parameters.values():
            yield from _ropes(value)


def _obstacle(backbone: Backbone) -> str:
    """Compare answers to short prompts with and without a cache; return what is wrong, or an empty string."""
    words = [list(backbone.encoder.encode(text)) for text in (" a b c d e f g", " h i", " c a", " k l m n")]
    room = backbone.max_length - max(len(words[1]) + len(words[2]), len(words[3]))
    head = tuple([*backbone.layout.prefix, *words[0]][:room])
    tails = (tuple(words[3]), tuple(words[1] + words[2]), tuple(words[2]))
    if len(head) < 2:
        return f"prompts of {backbone.max_length} tokens are too short to share anything"
    tokens = backbone.vocabulary[:64].cpu().expand(len(tails), -1)
    lines = [head + tail for tail in tails]
    whole = backbone.candidate_logits(Batch.of_ids(lines, [(i, len(x) - 1) for i, x in enumerate(lines)], tokens))

    def at_ends(tree: Tree, other: Tree | None = None) -> Tensor:
        found = grow(backbone, None, [tree] if other is None else [other, tree])[-1]
        return backbone.logits_at(
            torch.stack([x[-1] for x in found.branches]), tokens, torch.ones_like(tokens, dtype=torch.bool)
        )

    try:
        past = grow(backbone, None, [Tree(None, head, ())])[0].prefix()
        half = past.head(len(head) // 2)
        other = grow(backbone, None, [Tree(None, tails[0], ())])[0].prefix()
        found = [
            at_ends(Tree(None, head, tails)),
            at_ends(Tree(past, (), tails), Tree(other, tails[1], (tails[2],))),
            at_ends(Tree(half, head[len(half.ids) :], tails)),
        ]
    except Exception as error:  # a model may refuse positions, a mask or a cache in any way; whole prompts then
        return f"{type(backbone.model).__name__} takes no packed prompts: {type(error).__name__}: {error}"
    exact = backbone.precision == "none" and next(backbone.model.parameters()).dtype == torch.float32
    spread = float((whole - whole.mean(-1, keepdim=True)).abs().max())
    difference = max(float((one - whole).abs().max()) for one in found)
    if difference <= (1e-3 if exact else 0.1) * spread:
        return ""
    return f"{type(backbone.model).__name__} answers packed prompts differently, by {difference:.3g} in the logits"
