"""Where tags come from: the tag files that others were composed of or begun with, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MOST_GENERATIONS = 8
"""Of older generations a file no longer tells the ancestors: it stays a few kilobytes, however often tags are mixed."""


@dataclass(frozen=True)
class Parent:
    """One of the tag files that tags were made of.

    Attributes:
        name: its hub name or the end of its folder's path, which says what it is; `tensors_sha256` says which one.
        tensors_sha256: the checksum of its ``tags.safetensors``.
        tags: which of its tags were used: their names there, by their names now.
        weight: its share in an average or interpolation.
        commit: the hub's commit that it was read from.
        training: the summary of its own warm-up.
        ancestry: what it was made of itself.
    """

    name: str
    tensors_sha256: str
    tags: Mapping[str, str]
    weight: float | None = None
    commit: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    ancestry: Ancestry | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            "name": self.name,
            "tensors_sha256": self.tensors_sha256,
            "tags": dict(self.tags),
            "weight": self.weight,
            "commit": self.commit,
            "training": dict(self.training),
            "ancestry": None if self.ancestry is None else self.ancestry.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, depth: int = 0) -> Parent:
        """Read what `to_json` returned; errors as in `Ancestry.from_json`."""
        return cls(
            str(data["name"]),
            str(data["tensors_sha256"]),
            {str(name): str(old) for name, old in data["tags"].items()},
            None if data["weight"] is None else float(data["weight"]),
            None if data["commit"] is None else str(data["commit"]),
            dict(data["training"]),
            None if data["ancestry"] is None else Ancestry.from_json(data["ancestry"], depth + 1),
        )


@dataclass(frozen=True)
class Ancestry:
    """How tags were made of others.

    Attributes:
        operation: ``select``, ``rename``, ``merge``, ``average``, ``interpolate``, ``warm-up`` (begun with tags of
            the parents) or ``change`` (values of a loaded model that were changed since).
        parents: what they were made of.
    """

    operation: str
    parents: tuple[Parent, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data, ancestors of long ago left out."""
        kept = self.recent(MOST_GENERATIONS)
        return {"operation": kept.operation, "parents": [parent.to_json() for parent in kept.parents]}

    @classmethod
    def from_json(cls, data: Any, depth: int = 0) -> Ancestry:
        """Read what `to_json` returned.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the data is no ancestry, or an endless one.
        """
        if depth >= MOST_GENERATIONS:
            raise ValueError(f"an ancestry of more than {MOST_GENERATIONS} generations")
        return cls(str(data["operation"]), tuple(Parent.from_json(parent, depth) for parent in data["parents"]))

    def recent(self, generations: int) -> Ancestry:
        """Return the ancestry with so many generations of parents, at least 1."""
        older = generations - 1
        return replace(
            self,
            parents=tuple(
                replace(p, ancestry=p.ancestry.recent(older) if p.ancestry is not None and older else None)
                for p in self.parents
            ),
        )
