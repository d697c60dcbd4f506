"""What a causal model has computed of prompts, kept for later calls: keys and values of the ids they begin with."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icl_markup.branches import common
from icl_markup.packing import Prefix
from icl_markup.tags import TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone

_LOG = logging.getLogger(__name__)
MOST_BYTES = 2**30
MOST_ENTRIES = 256
"""The most prefixes that are kept, however small: every one is compared with where none begins a prompt whole."""


@dataclass
class Counts:
    """What a cache has saved.

    Attributes:
        hits: prefixes that were asked for and there, whole.
        misses: prefixes that were asked for, and a part of which or all had to be computed.
        computed: tokens of prefixes that were computed.
        reused: tokens that prompts began with and that were not computed for them.
        refused: prefixes that were too large to be kept.
    """

    hits: int = 0
    misses: int = 0
    computed: int = 0
    reused: int = 0
    refused: int = 0


class PrefixCache:
    """Keys and values of prefixes, those dropped first that have not been used for longest.

    They hold for one state of the model and of the tags' table: all are dropped where a row of the table differs, or
    a weight was written to or replaced. Only what changes the model by other means (its configuration, a hook, a
    write through ``Tensor.data``) is not noticed, and calls for `clear`.

    Args:
        most_bytes: the most bytes that kept keys and values take; 0 keeps none.

    Attributes:
        counts: what was saved so far.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self.counts = Counts()
        self._entries: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._bytes = 0
        self._state: tuple[Any, ...] = ()

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

    def refresh(self, backbone: Backbone, table: TagTable | None) -> None:
        """Drop every prefix if the model's weights or the table's rows are not those of the last call.

        Rows are compared by what they hold. For weights that takes too long; they are compared by where they are, and
        by PyTorch's count of writes to them, which tensors made in inference mode lack.
        """
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in backbone.model.parameters())
        rows = b"" if table is None else table.all_rows().detach().cpu().numpy().tobytes()
        state = (weights, hashlib.blake2b(rows, digest_size=16).digest())
        if state != self._state:
            self.clear()
            self._state = state

    def __contains__(self, ids: tuple[int, ...]) -> bool:
        return ids in self._entries

    def longest(self, ids: tuple[int, ...]) -> Prefix | None:
        """Return the longest beginning of `ids` that is kept, a part of a prefix perhaps; None where none is.

        The prefix that it comes from, of several the one used last, counts as used.
        """
        key, length = ids, len(ids)
        if key not in self._entries:
            length = 0
            for kept in reversed(self._entries):
                if kept[: length + 1] == ids[: length + 1]:
                    key, length = kept, common(kept, ids)
        if not length:
            return None
        self._entries.move_to_end(key)
        return self._entries[key].head(length)

    def keep(self, prefix: Prefix) -> None:
        """Keep a prefix, and drop others to make room; one that is larger than all room is refused, which is logged."""
        if prefix.ids in self._entries:
            return
        if prefix.bytes > self.most_bytes:
            if self.most_bytes and not self.counts.refused:
                _LOG.warning(
                    "the %d tokens that prompts begin with take %d MiB of keys and values, more than the %d MiB that "
                    "are kept, and are computed in every call; raise cache_bytes (fit --cache-mib)",
                    len(prefix.ids), prefix.bytes >> 20, self.most_bytes >> 20,
                )  # fmt: skip
            self.counts.refused += 1
            return
        self._entries[prefix.ids] = prefix
        self._bytes += prefix.bytes
        while self._bytes > self.most_bytes or len(self._entries) > MOST_ENTRIES:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= dropped.bytes
