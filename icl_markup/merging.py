"""A copy of a backbone whose vocabulary has rows for the tags, and whose head cannot answer with one.

The frozen weights are shared with the original, not copied: only the embedding, the head and its bias are new.

A tag must never be generated, so its row of the head has to lose whatever the hidden state. Where the head has a bias,
or a BART adds one after it, the tag's is `NEVER`. Where there is none, the row is the mean of all other rows: its logit
is then the mean of the other logits, which cannot exceed the largest, and its probability is at most one in the size of
the vocabulary (the exponential of a mean is at most the mean of the exponentials). A row of zeros, in contrast, wins
wherever all logits are negative. A head that is tied to the embedding and has no bias is untied for this.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from icl_markup.backbone import Backbone
from icl_markup.errors import ExportError
from icl_markup.exportable import embedding_scale

NEVER = -1e4
"""The bias of a tag in a head that has one; the probability is zero in every type of number."""


def with_rows(backbone: Backbone, ids: Sequence[int], rows: Tensor | None) -> PreTrainedModel:
    """Return a copy of the backbone's model whose input embedding has `rows` at `ids`.

    Spare rows of the embedding are used where it reaches beyond `ids`; otherwise it is resized, and with it the head.

    Args:
        backbone: the backbone; its own model stays as it is.
        ids: the tags' ids in the new vocabulary.
        rows: what the embedding shall answer for them, (ids, embedding width); None for the mean of all others.

    Raises:
        ExportError: the architecture keeps its vocabulary in a way that is not known here.
    """
    model = backbone.model
    table, head = embedding_weight(backbone), model.get_output_embeddings()
    size = max(len(table), max(ids) + 1)
    new_table = _resized(table, size, ids)
    if rows is not None:
        new_table[list(ids)] = (rows.to(table.device) / embedding_scale(backbone)).to(table.dtype)
    bias = getattr(head, "bias", None)
    after = getattr(model, "final_logits_bias", None)  # BART's kind adds it to what the head says, (1, rows)
    biased = bias is not None or after is not None
    tied = head.weight.data_ptr() == table.data_ptr()
    new_head = new_table if tied and biased else _resized(head.weight, size, ids)
    new_bias = None
    if bias is not None:
        new_bias = _resized(bias, size, ids)
        new_bias[list(ids)] = NEVER
    untied = not tied or not biased
    head_keys = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in head_keys:
            state[key] = new_head
        elif key == "final_logits_bias":
            state[key] = _resized(value[0], size, ids)[None]
            state[key][0, list(ids)] = NEVER
        elif value.data_ptr() == table.data_ptr():
            state[key] = new_table
        elif bias is not None and new_bias is not None and value.data_ptr() == bias.data_ptr():
            state[key] = new_bias
        else:
            state[key] = value
    return _assembled(model, state, ids, size, head_keys if untied else set())


def embedding_weight(backbone: Backbone) -> Tensor:
    """Return the input embedding's table, (rows, embedding width)."""
    return next(backbone.embedding.parameters()).detach()


def _resized(weight: Tensor, size: int, ids: Sequence[int]) -> Tensor:
    """Return a copy of `size` rows whose rows at `ids`, and new ones, are the mean of the others."""
    weight = weight.detach()
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    others[[i for i in ids if i < len(weight)]] = False
    mean = weight[others].double().mean(0).to(weight.dtype)
    new = mean.expand(size, *weight.shape[1:]).clone()
    new[: len(weight)][others] = weight[others]
    return new


def _assembled(
    model: PreTrainedModel, state: dict[str, Tensor], ids: Sequence[int], size: int, untied: set[str]
) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for one in {id(config): config, id(text): text}.values():
        if hasattr(one, "vocab_size"):
            one.vocab_size = size
        if untied:
            _say_untied(one)
    try:
        with torch.device("meta"):
            merged = type(model)(config)
        for key, value in merged.state_dict().items():
            # BERT without tied weights has a second bias as high as its vocabulary, which nothing reads.
            if value.ndim and len(value) == size != len(state[key]):
                state[key] = _resized(state[key], size, ids)
        merged.load_state_dict(state, assign=True)
        for name, buffer in model.named_buffers():  # what is not saved is not in the state, such as rotary frequencies
            if name not in state:
                owner, _, last = name.rpartition(".")
                setattr(merged.get_submodule(owner), last, buffer)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{type(model).__name__}: its vocabulary cannot be extended: {error}") from error
    for key in untied:
        merged.all_tied_weights_keys.pop(key, None)
    if untied:
        _say_untied(merged.config)
    merged.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return merged.eval().requires_grad_(False)


def _say_untied(config: PretrainedConfig) -> None:
    """Have a configuration say that the head is not tied; called again at the end, as T5's forgets it when built.

    An old T5 scales what its head is given if this says tied, whatever the head: there it has to stay. Transformers
    then finds two different tables in the file and ties nothing.
    """
    if not getattr(config, "scale_decoder_outputs", False):
        config.tie_word_embeddings = False
