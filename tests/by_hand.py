"""Plain forward passes of transformers, with the tags' vectors put in by hand, to hold the package's own path to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icl_markup.model import MarkupModel


@torch.no_grad()
def logits_by_hand(model: MarkupModel, ids: Sequence[int]) -> Tensor:
    """Return the logits of a causal model after each token of one prompt, (tokens, vocabulary)."""
    backbone, table = model.backbone, model.table
    assert table is not None
    rows = table.all_rows()
    vectors = []
    for index in ids:
        if index >= table.first_id:
            vectors.append(rows[index - table.first_id])
        else:
            vectors.append(backbone.embedding(torch.tensor([index]))[0])
    return backbone.model(inputs_embeds=torch.stack(vectors)[None], use_cache=False).logits[0]


@torch.no_grad()
def name_scores_by_hand(model: MarkupModel, ids: Sequence[int], names: Sequence[Sequence[int]]) -> list[float]:
    """Return the summed log-probability of each name, given as its ids, behind a prompt."""
    found = []
    for name in names:
        logs = logits_by_hand(model, [*ids, *name]).log_softmax(-1)
        found.append(sum(float(logs[len(ids) - 1 + place, token]) for place, token in enumerate(name)))
    return found
