"""Checks of a backbone on short inputs: that it computes here what it computes by itself, whatever its architecture."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from icl_markup.batching import Batch
from icl_markup.errors import BackboneError
from icl_markup.tags import Tag, TagTable

if TYPE_CHECKING:
    from icl_markup.backbone import Backbone


@torch.no_grad()
def check_head(backbone: Backbone) -> None:
    """Compare our logits with the model's own on one short input; refuse a model where they differ."""
    ids = [*backbone.layout.prefix, *backbone.encoder.encode(" a b c"), *backbone.layout.suffix][: backbone.max_length]
    tokens = backbone.vocabulary[:26].cpu()
    batch = Batch.of_ids([ids], [(0, 0 if backbone.kind == "seq2seq" else len(ids) - 1)], tokens[None])
    inputs = {"input_ids": batch.input_ids.to(backbone.device)}
    if backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = backbone.decoder_ids(batch)
    with backbone.autocast():
        full = backbone.model(**inputs).logits[0, batch.positions[0]].float().cpu()[tokens]
    ours = backbone.candidate_logits(batch)[0].cpu()
    scale = full.abs().max().clamp(min=1.0)
    if not torch.allclose(ours / scale, full / scale, atol=0.05):
        raise BackboneError(
            f"{type(backbone.model).__name__}: logits computed for single candidates differ from the model's own by "
            f"{(ours - full).abs().max():.3g}; this architecture changes logits after its head in an unknown way"
        )


def check_lookups(backbone: Backbone) -> None:
    """Check that the ids of tags are looked up nowhere but in the input embedding; at no cost for most models.

    Raises:
        BackboneError: each layer looks ids up in a table of its own, as in the small models of Gemma 4.
    """
    tables = [m for n, m in backbone.model.named_modules() if n.endswith("embed_tokens_per_layer")]
    tag = torch.tensor([[backbone.first_tag_id]], device=backbone.device)
    row = torch.zeros(1, backbone.width, device=backbone.device)
    hooks = [table.register_forward_pre_hook(partial(_refuse_tags, backbone)) for table in tables]
    try:
        if hooks:  # Gemma 3n masks the ids that are beyond that table, which only a pass shows
            backbone.hidden_states({"input_ids": tag, "use_cache": False}, TagTable([Tag("<a>")], row, int(tag)))
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_tags(backbone: Backbone, _table: nn.Module, args: tuple[Any, ...]) -> None:
    if bool((args[0] >= backbone.first_tag_id).any()):
        raise BackboneError(
            f"backbone {backbone.name!r} ({type(backbone.model).__name__}) looks token ids up in every layer, where "
            "soft tokens have no row; choose a model without such tables, or a template in plain words"
        )


def check_sees_nothing_ahead(backbone: Backbone) -> bool:
    """Return whether a token's states are the same, to the bit, whatever follows it."""
    ids = [*backbone.layout.prefix, *backbone.encoder.encode(" a b c")][: max(1, backbone.max_length - 2)]
    found = []
    with torch.no_grad():
        for ends in (" d e", " f g"):
            line = torch.tensor([[*ids, *backbone.encoder.encode(ends)][: backbone.max_length]], device=backbone.device)
            states = backbone.hidden_states({"input_ids": line, "use_cache": False})
            found.append((line.shape, states[0, : len(ids)]))
    return found[0][0] == found[1][0] != (1, len(ids)) and torch.equal(found[0][1], found[1][1])
