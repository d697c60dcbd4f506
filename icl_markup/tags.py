"""Tags, the table of their soft tokens, and the substitution of that table into a frozen backbone.

The table is one fp32 parameter. Its rows stand in for embedding rows where the backbone's input embedding is
called: tag ids begin where the vocabulary's rows end, so nothing is resized and no logit changes.
Reference: ICL Markup (Brunet, Anderson, Zemel 2023), arXiv 2312.07405.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icl_markup.errors import PromptError

Initialisation = Literal["description", "vocabulary", "normal"]


@dataclass(frozen=True)
class Tag:
    """A tag as it is written in a prompt.

    Attributes:
        name: the written form, such as ``<demo>``.
        width: how many soft tokens it stands for, at least 1.
        description: the words it is initialised from.
    """

    name: str
    width: int = 1
    description: str = ""


class TagTable(nn.Module):
    """The soft tokens of some tags: one fp32 parameter `rows` of shape (sum of widths, embedding width).

    Tags can be frozen: their rows then lie in a buffer, `rows` holds the others, and neither a gradient, its norm,
    nor an optimiser's moment or decay concerns them. Where all rows are wanted, `all_rows` has them.

    Args:
        tags: the tags; their order is the order of the rows.
        rows: initial values, of that shape.
        first_id: the id of the first row: the number of rows of the backbone's embedding.

    Attributes:
        count: the number of rows, frozen ones included.
    """

    frozen: Tensor
    """The rows of frozen tags, in the order of the tags."""

    _place: Tensor
    """Where each row lies in `rows` followed by `frozen`."""

    def __init__(self, tags: Iterable[Tag], rows: Tensor, first_id: int):
        super().__init__()
        self.tags = tuple(tags)
        self.first_id = first_id
        self.count = sum(tag.width for tag in self.tags)
        if rows.ndim != 2 or rows.shape[0] != self.count:
            raise PromptError(
                f"the tags need {self.count} rows of soft tokens; a table of shape {tuple(rows.shape)} was given"
            )
        self.rows = nn.Parameter(rows.detach().to(torch.float32).clone())
        self.register_buffer("frozen", torch.empty(0, rows.shape[1], device=rows.device))
        self.register_buffer("_place", torch.arange(self.count, device=rows.device))
        self._ids: dict[str, list[int]] = {}
        start = first_id
        for tag in self.tags:
            if tag.name in self._ids:
                raise PromptError(f"tag {tag.name} stands twice in one table")
            self._ids[tag.name] = list(range(start, start + tag.width))
            start += tag.width

    def ids(self, name: str) -> list[int]:
        """Return the ids of a tag's soft tokens.

        Raises:
            PromptError: the table has no such tag.
        """
        if name not in self._ids:
            raise PromptError(f"no tag {name}; the table has {', '.join(self._ids) or 'none'}")
        return self._ids[name]

    def all_rows(self) -> Tensor:
        """Return the rows of all tags, shape (`count`, embedding width); differentiable in those not frozen."""
        if not len(self.frozen):
            return self.rows
        return F.embedding(self._place, torch.cat([self.rows, self.frozen]))

    @torch.no_grad()
    def freeze(self, names: Iterable[str]) -> None:
        """Keep the rows of these tags, and of no others, as they are: `rows` becomes a new parameter without them.

        Raises:
            PromptError: a name is not in the table.
        """
        rows = self.all_rows().detach()
        kept = {i - self.first_id for name in names for i in self.ids(name)}
        order = [i for i in range(self.count) if i not in kept] + sorted(kept)
        place = torch.empty(self.count, dtype=torch.long)
        place[torch.tensor(order, dtype=torch.long)] = torch.arange(self.count)
        ordered = rows[torch.tensor(order, dtype=torch.long, device=rows.device)]
        self.rows = nn.Parameter(ordered[: self.count - len(kept)].clone())
        self.frozen = ordered[self.count - len(kept) :].clone()
        self._place = place.to(rows.device)

    def vectors(self) -> dict[str, Tensor]:
        """Return a copy of each tag's rows, of shape (width, embedding width), fp32, on the CPU."""
        offset = self.first_id
        rows = self.all_rows().detach()
        return {name: rows[ids[0] - offset : ids[-1] - offset + 1].cpu().clone() for name, ids in self._ids.items()}

    @torch.no_grad()
    def load_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Copy rows by tag name; tags that `vectors` lacks keep theirs.

        Raises:
            PromptError: a name is not in the table, or a shape differs.
        """
        for name, value in vectors.items():
            ids = self.ids(name)
            wanted = (len(ids), self.rows.shape[1])
            if tuple(value.shape) != wanted:
                raise PromptError(f"tag {name} has shape {wanted}; {tuple(value.shape)} was given")
            for row, new in zip(ids, value, strict=True):
                place = int(self._place[row - self.first_id])
                trained = len(self.rows)
                (self.rows[place] if place < trained else self.frozen[place - trained]).copy_(new)

    def spans(self, ids: Tensor) -> Tensor:
        """Return which of `ids` (any shape) are ids of this table."""
        return (ids >= self.first_id) & (ids < self.first_id + self.count)


def tags_in_vocabulary(tags: Iterable[Tag], vocabulary: Mapping[str, int]) -> list[Tag]:
    """Return the tags whose names are tokens of a tokenizer already.

    The classic recipe for extending a tokenizer adds the new tokens minus the vocabulary. Our tags live beside
    the vocabulary, so a name that is taken works all the same; but who reads it should know that there are two.
    """
    return [tag for tag in tags if tag.name in vocabulary]


@contextmanager
def substituted(embedding: nn.Module, table: TagTable) -> Iterator[None]:
    """While active, `embedding` answers tag ids with rows of `table`, and every other id as before.

    The frozen table is looked up with tag ids replaced by 0, then tag rows are put in with ``torch.where``;
    a call without any tag id returns what it would have returned without us, to the bit.
    """
    pending: list[Tensor] = []

    def replace_ids(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        ids = args[0] if args else kwargs["input"]
        pending.append(ids)
        safe = ids.masked_fill(table.spans(ids), 0)
        return ((safe, *args[1:]), kwargs) if args else (args, {**kwargs, "input": safe})

    def put_rows_in(_module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        ids = pending.pop()
        is_tag = table.spans(ids)
        index = (ids - table.first_id).clamp(0, table.count - 1)
        # An embedding, as the gradient of indexing adds up in an order that varies between runs on several threads.
        rows = F.embedding(index, table.all_rows()).to(output.dtype)
        return torch.where(is_tag.unsqueeze(-1), rows, output)

    before = embedding.register_forward_pre_hook(replace_ids, with_kwargs=True)
    after = embedding.register_forward_hook(put_rows_in, with_kwargs=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def initial_rows(
    tags: Iterable[Tag],
    embedding: Callable[[Tensor], Tensor],
    vocabulary: Tensor,
    encode: Callable[[str], list[int]],
    *,
    method: Initialisation = "description",
    seed: int = 0,
) -> Tensor:
    """Return initial rows for `tags`, fp32, of shape (sum of widths, embedding width).

    Args:
        tags: the tags, in the order of the table.
        embedding: the backbone's input embedding: ids (n,) to vectors (n, embedding width).
        vocabulary: ids of ordinary tokens, shape (n,), from which rows are drawn or measured.
        encode: text to ids.
        method: ``description``: the mean embedding of the description's tokens, with noise of a tenth of the
            vocabulary's standard deviation so that the soft tokens of one tag differ; ``vocabulary``: rows
            drawn at random, without replacement where there are enough; ``normal``: drawn from the normal
            distribution that fits the vocabulary's mean and standard deviation, coordinate by coordinate.
        seed: seeds everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    tags = tuple(tags)
    total = sum(tag.width for tag in tags)
    with torch.no_grad():
        table = embedding(vocabulary).float().cpu()
        mean, deviation = table.mean(0), table.std(0)
        noise = torch.randn(total, table.shape[1], generator=generator) * deviation
        if method == "normal":
            return mean + noise
        if method == "vocabulary":
            return table[torch.randperm(len(table), generator=generator).repeat(1 + total // len(table))[:total]]
        rows = []
        for tag in tags:
            ids = encode(" " + (tag.description or tag.name.strip("<>")))
            centre = embedding(torch.tensor(ids, device=vocabulary.device)).float().cpu().mean(0) if ids else mean
            rows.append(centre.expand(tag.width, -1))
        return torch.cat(rows) + 0.1 * noise if rows else table[:0]
