"""Where the global layers of the embedded backbone begin: as nearest neighbours, read off the local layers' states.

Found by gradient descent, comparing texts and copying a symbol is a phase transition that may not come, and what is
found first is to know the training classes by heart. So the first global layer begins with both, solved from states by
ridge regression: a slot attends to symbols whose texts are similar, and takes on a mixture of their letters, which the
masked-LM head spells out (attention as kernel regression: Tsai et al. 2019, arXiv 1908.11775). The second begins with
no output. Accuracy is then close to that of class means of the same states, and training goes on from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from backbone_bank import DEMO, OPTION, QUERY, Entry
from backbone_model import LOCAL_LAYERS, Student
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 12.0
"""The attention logit, before the softmax, between two equal texts."""

PREFERENCE = 6.0
"""How far the attention logits of symbols lie above those of everything else, a slot itself included."""

LEANING = 1.0
"""How far the second head prefers demonstrations to options, and the third options to demonstrations."""

SPELT_OUT = 3.0
"""The masked-LM head's bias: where everything is this large, its GELU is a line."""

GAIN = 2.0
"""The scale of the masked-LM head's layer norm, and so of logits."""


@dataclass(frozen=True)
class Reading:
    """What is read off states after the local layers; each a linear map, applied to states less `centre`.

    Attributes:
        centre: the mean state of symbols and slots, shape (width,).
        text: the sentence embedding of the text beside it, (width, width).
        main: the main directions of those embeddings, (directions, width).
        norm: the mean length of an embedding in those directions.
        is_symbol: 1 for symbols, -1 for slots and the head, (width,), and what to add.
        is_demo: 1 for demonstrations' symbols, -1 for options', (width,), and what to add.
        letters: which symbol it is, one-hot less the mean, (symbols, width), and what to add, (symbols,).
        quiet: orthonormal directions in which slots hardly differ, (symbols, width).
        symbols: the symbols' token ids, (symbols,).
        slot: the mean state of slots, (width,).
        spread: the mean standard deviation within a state; and `mean`, the mean of all coordinates.
        length: the mean length of a state.
    """

    centre: Tensor
    text: Tensor
    main: Tensor
    norm: Tensor
    is_symbol: tuple[Tensor, Tensor]
    is_demo: tuple[Tensor, Tensor]
    letters: tuple[Tensor, Tensor]
    quiet: Tensor
    symbols: Tensor
    slot: Tensor
    spread: Tensor
    mean: Tensor
    length: Tensor


@torch.no_grad()
def start_matching(student: Student, bank: list[Entry]) -> None:
    """Set the global layers, the masked-LM head and both probes so that slots answer as nearest neighbours would.

    Args:
        student: the backbone in training, whose local layers have read the bank.
        bank: prompts to solve for; some thousand.
    """
    bert: Any = student.model.bert
    head: Any = student.model.cls.predictions
    words = bert.embeddings.word_embeddings.weight
    states, roles = torch.cat([e.states for e in bank]).float(), torch.cat([e.roles for e in bank])
    vectors = torch.cat([e.vectors for e in bank]).float()
    ids = torch.cat([e.symbols[e.owners[_shown(e.roles)]] for e in bank])
    size = student.model.config.hidden_size // student.model.config.icl_markup["global_heads"]
    found = _read(states, roles, vectors, ids, size - 1)
    student.probe.weight.copy_(found.text)
    student.probe.bias.copy_(vectors[roles > 0].mean(0) - found.text @ found.centre)
    spelling = _ridge(states[_shown(roles)] - found.centre, words[ids])
    student.symbol_probe.weight.copy_(spelling)
    student.symbol_probe.bias.copy_(-spelling @ found.centre)
    for number, layer in enumerate(bert.encoder.layer[LOCAL_LAYERS:]):
        _compare_and_copy(layer, found, share=0.0 if number else 1.0)
    embeddings = words[found.symbols]
    embeddings = embeddings - embeddings.mean(1, keepdim=True)
    spell = torch.linalg.pinv(embeddings - embeddings.mean(0)) @ found.quiet
    head.transform.dense.weight.copy_(0.3 * spell / spell.norm(dim=1).mean())
    head.transform.dense.bias.copy_(SPELT_OUT - head.transform.dense.weight @ found.slot)
    head.transform.LayerNorm.weight.fill_(GAIN)
    head.transform.LayerNorm.bias.zero_()
    head.bias.zero_()


def _shown(roles: Tensor) -> Tensor:
    return (roles == OPTION) | (roles == DEMO)


def _read(states: Tensor, roles: Tensor, vectors: Tensor, ids: Tensor, directions: int) -> Reading:
    """Solve for what is read off states, (n, width), of these roles and texts' embeddings; `ids` are the symbols'."""
    texts, shown = roles > 0, _shown(roles)
    centre = states[texts].mean(0)
    centred = states - centre
    text = _ridge(centred[texts], vectors[texts] - vectors[texts].mean(0))
    embedded = centred[texts] @ text.T
    some = torch.randperm(len(embedded), generator=torch.Generator().manual_seed(0))[:20000]
    # One coordinate of a head is left to tell symbols from the rest.
    main = torch.linalg.svd(embedded[some], full_matrices=False)[2][:directions]
    symbols = ids.unique()
    place = torch.searchsorted(symbols, ids)
    slots = states[roles == QUERY]
    some = torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))[:20000]
    loud_to_quiet = torch.linalg.svd(slots[some] - slots.mean(0), full_matrices=False)[2]
    means = torch.stack([torch.ones_like(centre), slots.mean(0), states[shown].mean(0)], dim=1)
    taken = torch.linalg.qr(means)[0]
    quiet = loud_to_quiet[-len(symbols) :]
    quiet = torch.linalg.qr((quiet - quiet @ taken @ taken.T).T)[0].T
    return Reading(
        centre, text, main, (embedded @ main.T).norm(dim=-1).mean(),
        _told_apart(centred, shown), _told_apart(centred[shown], roles[shown] == DEMO),
        _letters(centred[shown], F.one_hot(place, len(symbols)).float()), quiet, symbols,
        slots.mean(0), states.std(1).mean(), states.mean(), states.norm(dim=-1).mean(),
    )  # fmt: skip


def _ridge(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the linear map from inputs, (n, width), to targets, (n, k), shape (k, width)."""
    penalty = 1e-3 * inputs.square().sum(1).mean() * torch.eye(inputs.shape[1])
    found: Tensor = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)
    return found.T


def _told_apart(centred: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    sides = torch.where(positive, 1.0, -1.0)
    direction = _ridge(centred, sides[:, None])[0]
    return direction, (sides - centred @ direction).mean()


def _letters(centred: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Read letters off the states of symbols, rare ones as well as common ones."""
    weight = (one_hot / one_hot.mean(0)).sum(1, keepdim=True).sqrt()
    with_one = F.pad(centred, (0, 1), value=10.0)
    found = _ridge(weight * with_one, weight * one_hot)
    return found[:, :-1], 10 * found[:, -1] - 1 / one_hot.shape[1]


def _compare_and_copy(layer: Any, found: Reading, share: float) -> None:
    """Let a layer's slots take on the symbols of similar texts; `share` is their part, relative to a state's length."""
    attention, out = layer.attention.self, layer.attention.output
    heads, size = attention.num_attention_heads, attention.attention_head_size
    weight = math.sqrt(SHARPNESS * math.sqrt(size)) / found.norm * found.main @ found.text
    letters, rest = found.letters
    length = share * found.length
    out.dense.weight.zero_()
    for number in range(heads):
        first, last = number * size, number * size + size - 1
        for projection in (attention.query, attention.key):
            projection.weight[first:last] = weight
            projection.bias[first:last] = -weight @ found.centre
        leaning = (0.0, LEANING, -LEANING)[number % 3]
        one = math.sqrt(math.sqrt(size))  # which divides the product of queries and keys
        key = PREFERENCE / 2 * found.is_symbol[0] + leaning / 2 * found.is_demo[0]
        attention.query.weight[last] = 0.0
        attention.query.bias[last] = one
        attention.key.weight[last] = one * key
        attention.key.bias[last] = one * (
            PREFERENCE / 2 * found.is_symbol[1] + leaning / 2 * found.is_demo[1] - key @ found.centre
        )
        own = slice(first, first + len(letters))
        attention.value.weight[first : last + 1] *= 0.05
        attention.value.bias[first : last + 1] = 0.0
        attention.value.weight[own] = length * letters
        attention.value.bias[own] = length * (rest - letters @ found.centre)
        out.dense.weight[:, own] = found.quiet.T / heads
    out.dense.bias.zero_()
    layer.output.dense.weight.zero_()
    layer.output.dense.bias.zero_()
    for norm in (out.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(found.spread)
        norm.bias.fill_(found.mean)
