"""Segment-local attention: the lower layers of a masked backbone read each part of a prompt by itself.

An encoder of sentences represents a text well when it reads that text alone. In a prompt of many texts full
attention mixes them, and the positions of the later ones are ones that it hardly knows. Where a model's
configuration says ``icl_markup: {"local_layers": n}``, its first n layers attend within a segment (an option, a
demonstration or a query) and to the prompt's head; the layers above also attend to every option and demonstration.
Positions begin anew in each segment. Nothing attends to a query but that query, so that queries in one prompt
do not see each other, and the order of options and demonstrations has no influence. The same idea, with parallel
windows in a causal model: Ratner et al. 2023 (arXiv 2212.10947).

With ``"anchors": true`` the layers above attend, besides the head, to option symbols and slots alone: each is the one
place where its segment's text is summed up (label words as anchors: Wang et al. 2023, arXiv 2305.14160). With
``"global_heads": h`` those layers have h attention heads instead of the model's own number: a head compares texts
in as many dimensions as it is wide, and the 32 of a small encoder are too few to tell close labels apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from icl_markup.activations import recomputes
from icl_markup.blocked_attention import BLOCKED, MULTIPLE, rounded_up
from icl_markup.devices import to_device
from icl_markup.errors import BackboneError, nearest
from icl_markup.segment_blocks import SegmentBlocks

HEAD = 0
"""The segment of what every token sees: special tokens, the template's head and its tail. Options and demonstrations
are numbered upwards from 1, queries downwards from -1."""

PADDING = -(2**31)
"""The segment of padding, which nothing sees."""

_SETTINGS: dict[str, int | bool] = {"local_layers": 0, "max_length": 2048, "global_heads": 0, "anchors": False}
"""What ``icl_markup`` in a model's configuration may say, with the defaults."""


def local_layers(model: PreTrainedModel) -> int:
    """Return how many lower layers read segment by segment, as the model's configuration says; 0: none.

    Raises:
        BackboneError: the configuration says something that cannot be.
    """
    count = _setting(model, "local_layers", least=0)
    layers = getattr(model.config, "num_hidden_layers", None)
    if layers is not None and count > layers:
        raise BackboneError(
            f"icl_markup.local_layers in the model's config.json is {count}, but it has {layers} layers"
        )
    return count


def longest_prompt(model: PreTrainedModel) -> int | None:
    """Return the longest prompt in tokens of a model that numbers positions by segment; None for other models.

    Raises:
        BackboneError: the configuration says something that cannot be.
    """
    return _setting(model, "max_length", least=1) if local_layers(model) else None


def _setting(model: PreTrainedModel, key: str, least: int) -> int:
    where = "in the model's config.json"
    settings = getattr(model.config, "icl_markup", {})
    if not isinstance(settings, dict):
        raise BackboneError(f'icl_markup {where} is {settings!r}; it must be a mapping such as {{"local_layers": 4}}')
    for name in settings:
        if name not in _SETTINGS:
            known = ", ".join(_SETTINGS)
            hint = nearest(str(name), _SETTINGS)
            raise BackboneError(f"icl_markup {where} has an unknown key {name!r}{hint}; it may have {known}")
    value = settings.get(key, _SETTINGS[key])
    if isinstance(_SETTINGS[key], bool):
        if not isinstance(value, bool):
            raise BackboneError(f"icl_markup.{key} {where} is {value!r}; it must be true or false")
    elif not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BackboneError(f"icl_markup.{key} {where} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def looks_at_anchors(model: PreTrainedModel) -> bool:
    """Return whether the layers above the local ones attend to the head, symbols and slots alone.

    Raises:
        BackboneError: the configuration says something that cannot be.
    """
    return bool(_setting(model, "anchors", least=0))


def set_global_heads(model: PreTrainedModel) -> None:
    """Give the layers above the local ones as many attention heads as the model's configuration says; 0: as they are.

    Raises:
        BackboneError: that number does not divide the layers' width, or their attention is not like BERT's.
    """
    heads = _setting(model, "global_heads", least=0)
    if not heads:
        return
    for layer in encoder_layers(model)[local_layers(model) :]:
        attentions: list[Any] = [
            m for m in layer.modules() if hasattr(m, "num_attention_heads") and hasattr(m, "all_head_size")
        ]
        if len(attentions) != 1 or attentions[0].all_head_size % heads:
            raise BackboneError(
                f"icl_markup.global_heads in the model's config.json is {heads}, which does not fit the attention of "
                f"{type(model).__name__}"
            )
        attention = attentions[0]
        attention.num_attention_heads = heads
        attention.attention_head_size = attention.all_head_size // heads
        attention.scaling = attention.attention_head_size**-0.5


def position_ids(segments: Tensor, limit: int) -> Tensor:
    """Number the positions of each segment from the head's length on.

    Args:
        segments: the segment of each token, shape (prompts, longest).
        limit: the number of position embeddings; what lies beyond in a segment shares the last.

    Returns:
        int64, the same shape.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(begins, index, 0).cummax(dim=1).values
    in_head = (start == 0) & (segments == HEAD)
    head = in_head.sum(dim=1, keepdim=True)
    return (index - start + torch.where(in_head, 0, head)).clamp(max=limit - 1)


def visible(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return which token sees which in local and in global layers: bool, each (prompts, 1, longest, longest)."""
    seeing, seen = segments[:, None, :, None], segments[:, None, None, :]
    same = seeing == seen
    return same | (seen == HEAD), same | (seen >= HEAD)


class Reading(NamedTuple):
    """What a model that reads by segments is given, and where it puts its states.

    Attributes:
        inputs: inputs of the model, by name.
        places: where the states of the prompts' tokens stand in the model's output, shape (prompts, longest); None
            where they stand as they are. Tokens that global layers do not look at have no state there.
    """

    inputs: dict[str, Any]
    places: Tensor | None

    def positions(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return where the states of the tokens at (rows, positions), anchors, stand in the model's output."""
        return positions if self.places is None else self.places[rows, positions]


@contextmanager
def segment_attention(
    model: PreTrainedModel,
    segments: Tensor,
    anchors: Tensor | None = None,
    device: torch.device | None = None,
    in_blocks: bool = False,
) -> Iterator[Reading]:
    """While active, a call of `model` attends by segments; yields what the call is given, and where its states stand.

    Args:
        model: a masked model whose layers take an attention mask.
        segments: the segment of each token, shape (prompts, longest), on the CPU: how many tokens are kept is a number,
            for which another device would have to be waited for.
        anchors: where symbols and slots are, bool, the same shape; None where they are not known, or where whole names
            stand for symbols: global layers then see every token, whatever the model's configuration says. Where they
            see anchors alone, they are given nothing else to work on.
        device: the model's; None: the CPU.
        in_blocks: whether attention is trained in blocks (`icl_markup.blocked_attention`): local layers then compute
            what segments see alone (`icl_markup.segment_blocks`), and what is kept is padded to shapes that recur.

    Raises:
        BackboneError: the model cannot attend by segments (see `encoder_layers`), or its layers recompute their
            activations in a way that would lose the mask.
    """
    device = device or segments.device
    layers, positions = encoder_layers(model), _position_table(model)
    if any(_recomputes_hooks(layer) for layer in layers):
        raise BackboneError(
            "gradient checkpointing of a model that reads by segments needs a newer version of transformers; update "
            "it, or switch gradient_checkpointing off"
        )
    count = local_layers(model)
    offset = 0 if positions.padding_idx is None else positions.padding_idx + 1  # RoBERTa counts on from there
    numbers = position_ids(segments, positions.num_embeddings - offset) + offset
    inputs = {"position_ids": to_device(numbers, device)}
    local, everywhere = visible(to_device(segments, device))
    kept, places = None, None
    if anchors is not None and looks_at_anchors(model) and count < len(layers):
        kept, places = _kept(anchors | (segments == HEAD), MULTIPLE if in_blocks else 1)
        seen = segments.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, PADDING)
        everywhere = visible(to_device(seen, device))[1]
        kept, places = to_device(kept, device), to_device(places, device)
    with ExitStack() as hooks:
        blocks = SegmentBlocks.of(segments, HEAD, PADDING) if in_blocks and count else None
        if blocks is not None and not blocks.pays:
            blocks = None
        local_hook, global_hook = _masked(local, layers[0], blocks), _masked(everywhere, layers[0])
        for number, layer in enumerate(layers):
            hook = local_hook if number < count else global_hook
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if kept is not None:
            # Hooks that are registered later, but first in line: the mask takes its type from what it is given.
            gather = layers[count].register_forward_pre_hook(_gathered(kept), with_kwargs=True, prepend=True)
            hooks.enter_context(gather)
        yield Reading(inputs, places)


def _kept(wanted: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Return the positions of wanted tokens, (prompts, most wanted), -1 beyond a prompt's last, and their inverse."""
    counts = wanted.sum(1)
    kept = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, : rounded_up(int(counts.max()), multiple)]
    beyond = torch.arange(kept.shape[1], device=kept.device) >= counts[:, None]
    return kept.masked_fill(beyond, -1), wanted.cumsum(1) - 1


def _gathered(kept: Tensor) -> Callable[..., Any]:
    """Return a hook that gives a layer the states of some tokens alone."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        index = kept.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        chosen = states.gather(1, index)
        return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": chosen})

    return hook


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of an encoder.

    Raises:
        BackboneError: there is no list of layers as long as the configuration says, they take no attention mask,
            there is no table of position embeddings, or the attention takes no mask of our own.
    """
    wanted = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    found = next((layers for layers in lists if "attention_mask" in _parameters(layers[0])), None)
    if found is None or _position_table(model) is None:
        raise BackboneError(
            "icl_markup.local_layers in the model's config.json needs an encoder such as BERT or RoBERTa; the layers "
            f"or position embeddings of {type(model).__name__} are not like theirs"
        )
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention not in ("eager", "sdpa", BLOCKED):
        raise BackboneError(f"a model that reads by segments does so with attention eager or sdpa, not {attention}")
    return found


def _position_table(model: PreTrainedModel) -> Any:
    tables = (m for n, m in model.named_modules() if n.rpartition(".")[2] == "position_embeddings")
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def _parameters(layer: nn.Module) -> list[str]:
    return list(inspect.signature(layer.forward).parameters)


def _recomputes_hooks(layer: nn.Module) -> bool:
    """Whether the backward pass calls the layer anew, by when our hook is gone (as transformers 5.0 does)."""
    return recomputes(layer) and type(layer).__call__ is not nn.Module.__call__


def _masked(mask: Tensor, layer: nn.Module, blocks: SegmentBlocks | None = None) -> Callable[..., Any]:
    """Return a hook that gives layers this mask: additive, which eager and scaled dot-product attention take.

    It carries the segments, from which attention in blocks computes what the mask says.
    """
    made: dict[torch.dtype, Tensor] = {}
    place = _parameters(layer).index("attention_mask")

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        if dtype not in made:
            zeros = torch.zeros_like(mask, dtype=dtype)
            made[dtype] = zeros.masked_fill_(~mask, torch.finfo(dtype).min)
            if blocks is not None:
                made[dtype].segment_blocks = blocks  # type: ignore[attr-defined]
        if len(args) > place:
            return (*args[:place], made[dtype], *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": made[dtype]}

    return hook
