"""Batches: prompts padded to one length, cut so that each holds at most so many tokens, padding included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icl_markup.prompt import Prompt


@dataclass(frozen=True)
class Batch:
    """Padded prompts and their slots.

    Attributes:
        input_ids: (prompts, longest), int64, padded on the right.
        attention_mask: the same shape, 1 where a token is.
        rows: the prompt of each slot, (slots,).
        positions: the position of each slot, (slots,).
        candidates: token ids of each slot's options, (slots, most options).
        candidate_mask: which of those exist, the same shape, bool.
        targets: the index of the right option, -1 where unknown, (slots,).
        is_query: which slots belong to queries, (slots,), bool.
        decoder_ids: what a sequence-to-sequence decoder is given after its start token, or None.
        position_ids: the position of each token if it isn't its place, (prompts, longest); or None.
        visible: which token sees which, bool, (prompts, longest, longest); None: as the model has it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    positions: Tensor
    candidates: Tensor
    candidate_mask: Tensor
    targets: Tensor
    is_query: Tensor
    decoder_ids: Tensor | None = None
    position_ids: Tensor | None = None
    visible: Tensor | None = None

    @classmethod
    def of_ids(
        cls,
        ids: Sequence[Sequence[int]],
        slots: Sequence[tuple[int, int]],
        candidates: Tensor,
        *,
        candidate_mask: Tensor | None = None,
        targets: Sequence[int] | None = None,
        is_query: Sequence[bool] | None = None,
        pad_id: int = 0,
        decoder_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Batch:
        """Pad lists of ids to the longest; `slots` are pairs of (prompt, position)."""
        longest = max(map(len, ids))
        input_ids = torch.full((len(ids), longest), pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, line in enumerate(ids):
            input_ids[row, : len(line)] = torch.tensor(line)
            attention_mask[row, : len(line)] = 1
        index = torch.tensor(slots, dtype=torch.long).reshape(-1, 2)
        return cls(
            input_ids,
            attention_mask,
            index[:, 0],
            index[:, 1],
            candidates,
            torch.ones_like(candidates, dtype=torch.bool) if candidate_mask is None else candidate_mask,
            torch.tensor(targets if targets is not None else [-1] * len(slots), dtype=torch.long),
            torch.tensor(is_query if is_query is not None else [True] * len(slots), dtype=torch.bool),
            decoder_ids,
            position_ids,
            visible,
        )

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], pad_id: int = 0, *, all_slots: bool = True) -> Batch:
        """Pad prompts whose slots are answered by symbols; with `all_slots` false, queries' slots only."""
        slots = [(row, slot) for row, p in enumerate(prompts) for slot in p.slots if all_slots or slot.is_query]
        most = max(len(slot.candidates) for _, slot in slots)
        candidates = torch.zeros(len(slots), most, dtype=torch.long)
        mask = torch.zeros(len(slots), most, dtype=torch.bool)
        for i, (_, slot) in enumerate(slots):
            candidates[i, : len(slot.candidates)] = torch.tensor(slot.candidates)
            mask[i, : len(slot.candidates)] = True
        return cls.of_ids(
            [prompt.ids for prompt in prompts],
            [(row, slot.position) for row, slot in slots],
            candidates,
            candidate_mask=mask,
            targets=[-1 if slot.answer is None else slot.answer for _, slot in slots],
            is_query=[slot.is_query for _, slot in slots],
            pad_id=pad_id,
        )


def cut_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut items into batches of similar length.

    Args:
        lengths: the length of each item.
        tokens: the most tokens a batch may hold, padding included; a longer item has a batch of its own.

    Returns:
        Lists of indices into `lengths`: sorted by length (ties by index), then cut.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
