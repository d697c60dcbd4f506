"""What the global layers of the embedded backbone learn from: prompts as the local layers have read them, kept.

The global layers look at a prompt's head, symbols and slots alone, and what the local layers make of a symbol or slot
depends on its own segment alone. So every prompt is read once, and any part of it, with fewer options, demonstrations
or queries, is a prompt too: a bank of some thousand prompts is many times as many episodes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from backbone_data import Drawn, PromptStream, Teacher
from backbone_model import Student
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from icl_markup.batching import Batch
from icl_markup.segments import HEAD, PADDING
from icl_markup.tasks import NONE_OF_THE_ABOVE

TEMPERATURE = 0.05
"""Of the softmax over cosines that is the teacher's opinion."""

_TENSORS = ("states", "segments", "roles", "owners", "vectors", "symbols")

OPTION, DEMO, QUERY = 1, 2, 3
"""Roles of tokens; 0: the head."""


@dataclass(frozen=True)
class Entry:
    """A prompt after the local layers.

    Attributes:
        states: of the head, symbols and slots, shape (n, width); bf16.
        segments: of the same tokens, (n,).
        roles: 0 the head, `OPTION`, `DEMO` or `QUERY`, (n,).
        owners: the option that an option, demonstration or query belongs to, (n,).
        vectors: the teacher's embedding of the text beside each, (n, width); 0 for the head.
        symbols: token ids of the options' symbols, (options,).
        named: whether options have their own names.
        open_world: whether the last option is "none of the above".
    """

    states: Tensor
    segments: Tensor
    roles: Tensor
    owners: Tensor
    vectors: Tensor
    symbols: Tensor
    named: bool
    open_world: bool


@dataclass(frozen=True)
class Part:
    """Padded parts of entries.

    Attributes:
        states: (prompts, longest, width).
        segments: (prompts, longest).
        rows: the prompt of each slot, (slots,).
        positions: the position of each slot, (slots,).
        candidates: ids of each slot's symbols, (slots, most options).
        candidate_mask: which of those exist, bool.
        targets: the index of the right one, (slots,).
        opinions: what the teacher thinks, (slots, most options); all 0 where it has no opinion.
    """

    states: Tensor
    segments: Tensor
    rows: Tensor
    positions: Tensor
    candidates: Tensor
    candidate_mask: Tensor
    targets: Tensor
    opinions: Tensor


def entries(
    drawn: list[Drawn],
    hidden: Tensor,
    batch: Batch,
    stream: PromptStream,
    teacher: Teacher,
) -> list[Entry]:
    """Return entries of prompts whose states after the local layers are `hidden`, (prompts, longest, width)."""
    assert batch.segments is not None and batch.anchors is not None
    kept = batch.anchors | (batch.segments == HEAD)
    found = []
    for row, one in enumerate(drawn):
        episode = one.episode
        segments = batch.segments[row][kept[row]]
        count = len(episode.options)
        texts: list[tuple[int, ...]] = []
        roles, owners, places = [], [], []
        for place, segment in enumerate(segments.tolist()):
            if segment == HEAD:
                role, owner, text = 0, -1, None
            elif segment < 0:
                query = episode.queries[-segment - 1]
                assert query.answer is not None
                role, owner, text = QUERY, query.answer, query.text
            elif segment <= count:
                role, owner, text = OPTION, segment - 1, episode.options[segment - 1].name
            else:
                demo = episode.demos[segment - count - 1]
                role, owner, text = DEMO, demo.answer, demo.text
            roles.append(role)
            owners.append(owner)
            if text is not None:
                places.append(place)
                texts.append(stream.ids(text))
        vectors = torch.zeros(len(segments), hidden.shape[-1])
        vectors[places] = teacher.embed(texts)
        symbols = next(slot.candidates for slot in one.prompt.slots)
        found.append(
            Entry(
                hidden[row][kept[row]].bfloat16(),
                segments,
                torch.tensor(roles),
                torch.tensor(owners),
                vectors.bfloat16(),
                torch.tensor(symbols),
                one.named,
                episode.options[-1].name == NONE_OF_THE_ABOVE,
            )
        )
    return found


@torch.no_grad()
def build(student: Student, stream: PromptStream, teacher: Teacher, prompts: int) -> list[Entry]:
    """Read so many prompts."""
    bank: list[Entry] = []
    for _, drawn in stream.batches():
        batch = Batch.of_prompts([one.prompt for one in drawn])
        bank += entries(drawn, student.read(batch), batch, stream, teacher)
        if len(bank) >= prompts:
            return bank
    raise AssertionError("the stream has no end")


def save(bank: list[Entry], path: Path) -> None:
    """Write a bank."""
    tensors = {name: torch.cat([getattr(entry, name) for entry in bank]) for name in _TENSORS}
    tensors["lengths"] = torch.tensor([len(entry.roles) for entry in bank])
    tensors["options"] = torch.tensor([len(entry.symbols) for entry in bank])
    tensors["named"] = torch.tensor([entry.named for entry in bank])
    tensors["open_world"] = torch.tensor([entry.open_world for entry in bank])
    save_file(tensors, path)


def load(path: Path) -> list[Entry]:
    """Read a bank."""
    tensors = load_file(path)
    lengths, options = tensors["lengths"].tolist(), tensors["options"].tolist()
    parts = [tensors[name].split(options if name == "symbols" else lengths) for name in _TENSORS]
    flags = tensors["named"].tolist(), tensors["open_world"].tolist()
    return [Entry(*columns) for columns in zip(*parts, *flags, strict=True)]


def draw(bank: list[Entry], rng: random.Random, tokens: int) -> Part:
    """Draw parts of entries at random, about so many tokens in all."""
    parts: list[tuple[Entry, list[int], list[int]]] = []
    while sum(len(kept) for _, kept, _ in parts) < tokens:
        entry = rng.choice(bank)
        kept, options = _subset(entry, rng)
        if any(entry.roles[i] == QUERY for i in kept):
            parts.append((entry, kept, options))
    return collate(parts)


def whole(found: list[Entry]) -> Part:
    """Return entries as they are."""
    return collate([(e, list(range(len(e.roles))), list(range(len(e.symbols)))) for e in found])


def _subset(entry: Entry, rng: random.Random) -> tuple[list[int], list[int]]:
    """Choose tokens and options to keep."""
    options = list(range(len(entry.symbols)))
    real = options[:-1] if entry.open_world else options
    open_world = entry.open_world and rng.random() < 0.7
    if rng.random() < 0.5 and len(real) > 2:
        real = sorted(rng.sample(real, rng.randint(2, len(real))))
    owners, roles = entry.owners.tolist(), entry.roles.tolist()
    shots = 0 if entry.named and rng.random() < 0.15 else rng.randint(1, 5)
    uneven = entry.named and rng.random() < 0.15
    left = dict.fromkeys(real, shots)
    kept = []
    for i in rng.sample(range(len(roles)), len(roles)):
        role, owner = roles[i], owners[i]
        if role == DEMO:
            if left.get(owner, 0) and not (uneven and rng.random() < 0.5):
                left[owner] -= 1
                kept.append(i)
        elif role == QUERY:
            if owner in left or (open_world and rng.random() < (1.0 if owner == len(options) - 1 else 0.3)):
                kept.append(i)
        elif role == 0 or owner in left or (open_world and owner == len(options) - 1):
            kept.append(i)
    return sorted(kept), [*real, options[-1]] if open_world else real


def collate(parts: list[tuple[Entry, list[int], list[int]]]) -> Part:
    """Pad parts: of each entry the tokens and the options that are kept."""
    longest = max(len(kept) for _, kept, _ in parts)
    width = parts[0][0].states.shape[1]
    states = torch.zeros(len(parts), longest, width)
    segments = torch.full((len(parts), longest), PADDING)
    rows, positions, targets = [], [], []
    candidates, masks, opinions = [], [], []
    most = max(len(options) for *_, options in parts)
    for row, (entry, kept, options) in enumerate(parts):
        index = torch.tensor(kept)
        states[row, : len(kept)] = entry.states[index].float()
        segments[row, : len(kept)] = entry.segments[index]
        place = {old: new for new, old in enumerate(options)}
        slots = (entry.roles[index] == QUERY).nonzero()[:, 0].tolist()
        # A query whose own option is left out has "none of the above" for its answer, which is the last option.
        targets += [place.get(int(entry.owners[kept[i]]), len(options) - 1) for i in slots]
        rows += [row] * len(slots)
        positions += slots
        shown = F.pad(entry.symbols[torch.tensor(options)], (0, most - len(options)))
        mask = torch.arange(most) < len(options)
        opinion = F.pad(_opinion(entry, index, place, slots), (0, most - len(options)))
        candidates += [shown] * len(slots)
        masks += [mask] * len(slots)
        opinions.append(opinion)
    return Part(
        states, segments, torch.tensor(rows), torch.tensor(positions), torch.stack(candidates), torch.stack(masks),
        torch.tensor(targets), torch.cat(opinions),
    )  # fmt: skip


def _opinion(entry: Entry, index: Tensor, place: dict[int, int], slots: list[int]) -> Tensor:
    """Return what a nearest class mean of the teacher's embeddings thinks, (slots, options).

    Names count as examples. All 0 where an option has no example, or is "none of the above", for which none stands.
    """
    nothing = torch.zeros(len(slots), len(place))
    roles, owners, vectors = entry.roles[index], entry.owners[index], entry.vectors[index].float()
    shown = (roles == DEMO) | ((roles == OPTION) & entry.named)
    if entry.open_world and len(entry.symbols) - 1 in place:
        return nothing
    own = torch.tensor([place[int(o)] for o in owners[shown]], dtype=torch.long)
    if len(set(own.tolist())) < len(place):
        return nothing
    means = torch.zeros(len(place), vectors.shape[1]).index_add(0, own, vectors[shown])
    return (vectors[slots] @ F.normalize(means, dim=-1).T / TEMPERATURE).softmax(-1)
