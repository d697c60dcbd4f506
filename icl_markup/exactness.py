"""Whether a model that shares work between prompts or names answers as it does without.

For a causal model: whether, and up to what length, packed prompts over a cache are answered as whole ones are. For a
sequence-to-sequence model: whether names over the decoder's cache are scored as those that are read from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from icl_markup.batching import Batch
from icl_markup.decoding import decoder_states
from icl_markup.packing import Tree, attention_of, grow, takes_masks

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone

UNBOUNDED = 2**62


class Exactness(NamedTuple):
    """What a check found out.

    Attributes:
        limit: the longest prompt in tokens whose answers are the same; 0 if there is none.
        obstacle: why that is so, empty where there is no obstacle.
    """

    limit: int
    obstacle: str = ""


@torch.inference_mode()
def check_exactness(backbone: Backbone) -> Exactness:
    """Compare answers to short prompts, and read off the model's configuration where long ones are another matter."""
    if backbone.kind != "causal":
        return Exactness(0, f"a {backbone.kind} model reads a prompt in both directions")
    if not takes_masks(backbone):
        return Exactness(0, f"attention {attention_of(backbone)!r} may take no mask for each two tokens")
    obstacle = _obstacle(backbone)
    return Exactness(0 if obstacle else longest_exact(backbone.model.config), obstacle)


@torch.inference_mode()
def check_decoder(backbone: Backbone) -> str:
    """Compare a sequence-to-sequence model's states of names with and without the decoder's cache.

    Returns:
        Why names cannot share the work for their prompt, or an empty string.
    """
    words = [list(backbone.encoder.encode(text)) for text in (" a b c d e f g", " h i", " c a", " k l")]
    tails = [tuple((words[1] * 2)[:2]), tuple(words[2][:1]), tuple((words[3] * 2)[:2])]
    owners, lines = [0, 1, 1], [words[0], words[0] + words[1]]
    none = torch.zeros(0, 1, dtype=torch.long)
    try:
        first, states = decoder_states(backbone, Batch.of_ids(lines, [], none), tails, owners, None)
    except Exception as error:  # a model may refuse a cache in any way; names are then read from the start
        return f"{type(backbone.model).__name__} takes no cache for names: {type(error).__name__}: {error}"
    assert states is not None
    slots = [(row, k) for row, tail in enumerate(tails) for k in range(len(tail) + 1)]
    ids = torch.tensor([[*tail, *[0] * (2 - len(tail))] for tail in tails])
    whole = backbone.slot_states(Batch.of_ids([lines[row] for row in owners], slots, none, decoder_ids=ids))
    shared = [
        torch.stack([first[row], *states[i, : len(tail)]])
        for i, (row, tail) in enumerate(zip(owners, tails, strict=True))
    ]
    spread = float((whole - whole.mean(-1, keepdim=True)).abs().max())
    difference = float((torch.cat(shared) - whole).abs().max())
    if difference <= (1e-3 if backbone.is_exact else 0.1) * spread:
        return ""
    return f"{type(backbone.model).__name__} answers differently over a cache, by {difference:.3g} in its states"


def longest_exact(config: Any) -> int:
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
    spread = float((whole - whole.mean(-1, keepdim=True)).abs().max())
    difference = max(float((one - whole).abs().max()) for one in found)
    if difference <= (1e-3 if backbone.is_exact else 0.1) * spread:
        return ""
    return f"{type(backbone.model).__name__} answers packed prompts differently, by {difference:.3g} in the logits"
