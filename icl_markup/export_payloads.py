"""Requests for serving engines that are given tags without a checkpoint of their own, or a merged one.

Formats, as their sources have them (neither engine is started here; the tests read what is sent as these do, in code
of their own):

- vLLM's completions API takes ``prompt_embeds``: base64 of a tensor (tokens, hidden width) saved by ``torch.save``,
  for a server started with ``--enable-prompt-embeds``
  (https://docs.vllm.ai/en/stable/features/prompt_embeds/; read by ``safe_load_prompt_embeds`` with ``weights_only``).
- vLLM's completions API takes token ids as ``prompt``, and ``allowed_token_ids`` among its sampling parameters
  (https://docs.vllm.ai/en/stable/serving/openai_compatible_server/).
- SGLang's ``/v1/score`` takes token ids and, for each item, the vectors that stand where a placeholder id does
  (``ScoringRequest`` in ``sglang/srt/entrypoints/openai/protocol.py``, version 0.5.23: ``embed_override_token_id``,
  ``item_embed_overrides`` of shape (items, placeholders, hidden width)).

All are for causal backbones: neither engine scores the slot of a masked model, and T5 runs in neither.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from icl_markup.errors import ExportError
from icl_markup.exportable import check_exportable
from icl_markup.model import MarkupModel
from icl_markup.prompt import Prompt
from icl_markup.tags import substituted


@torch.inference_mode()
def prompt_embeds(model: MarkupModel, prompt: Prompt) -> Tensor:
    """Return the input embeddings of a prompt with the tags' rows put in: (tokens, hidden width), in the weights' type.

    They are what the model's first layer is given, so that ``model(inputs_embeds=...)`` answers as ids do.

    Raises:
        ExportError: the backbone is not causal, or it scales what an engine is given once more.
    """
    check_exportable(model, "vectors")
    assert model.table is not None
    backbone = model.backbone
    with substituted(backbone.embedding, model.table):
        found: Tensor = backbone.embedding(torch.tensor([prompt.ids], device=backbone.device))[0]
    return found


def vllm_embeds_request(model: MarkupModel, prompt: Prompt, name: str) -> dict[str, Any]:
    """Return the body of a request to vLLM's ``/v1/completions`` that carries the prompt as embeddings.

    Args:
        model: the model; its tags stay here, the server holds the bare backbone.
        prompt: a prompt that `model.markup` composed.
        name: the model's name at the server.

    Raises:
        ExportError: the backbone is not causal, or whole names are scored.
    """
    buffer = io.BytesIO()
    torch.save(prompt_embeds(model, prompt).cpu(), buffer)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"model": name, "prompt_embeds": encoded, **_one_of(_candidates(prompt))}


def vllm_ids_request(prompt: Prompt, name: str) -> dict[str, Any]:
    """Return the body of a request to vLLM's ``/v1/completions`` for a merged checkpoint, the prompt as token ids.

    Args:
        prompt: a prompt in the checkpoint's ids (`icl_markup.exported.Exported.prompts`).
        name: the model's name at the server.

    Raises:
        ExportError: whole names are scored.
    """
    return {"model": name, "prompt": list(prompt.ids), **_one_of(_candidates(prompt))}


def sglang_score_request(model: MarkupModel, prompts: Sequence[Prompt], name: str) -> dict[str, Any]:
    """Return the body of a request to SGLang's ``/v1/score``: token ids, and vectors for the tags alone.

    Where a tag's soft token stands, the ids have a placeholder that stands nowhere else in these prompts; the server
    holds the bare backbone. The answer's ``scores`` are one list of probabilities a prompt, in the options' order.

    Args:
        model: the model.
        prompts: prompts that `model.markup` composed.
        name: the model's name at the server.

    Raises:
        ExportError: the backbone is not causal, whole names are scored, prompts have unlike candidates, or there are
            none.
    """
    check_exportable(model, "vectors")
    assert model.table is not None
    if not prompts:
        raise ExportError("there is no prompt to make a request of")
    table = model.table
    placeholder = _unused(model, prompts)
    rows = table.all_rows().detach().to(next(model.backbone.embedding.parameters()).dtype).float().cpu()
    items, overrides = [], []
    for prompt in prompts:
        tags = [i for i in prompt.ids if i >= table.first_id]
        items.append([placeholder if i >= table.first_id else i for i in prompt.ids])
        overrides.append([rows[i - table.first_id].tolist() for i in tags])
    return {
        "model": name,
        "query": [],
        "items": items,
        "label_token_ids": _shared_candidates(prompts),
        "embed_override_token_id": placeholder,
        "item_embed_overrides": overrides,
        "apply_softmax": True,
    }


def sglang_ids_request(prompts: Sequence[Prompt], name: str) -> dict[str, Any]:
    """Return the body of a request to SGLang's ``/v1/score`` for a merged checkpoint; see `vllm_ids_request`.

    Raises:
        ExportError: whole names are scored, prompts have unlike candidates, or there are none.
    """
    if not prompts:
        raise ExportError("there is no prompt to make a request of")
    labels = _shared_candidates(prompts)
    items = [list(prompt.ids) for prompt in prompts]
    return {"model": name, "query": [], "items": items, "label_token_ids": labels, "apply_softmax": True}


def _one_of(candidates: Sequence[int]) -> dict[str, Any]:
    """Return sampling parameters by which the answer is the likeliest candidate, named by its id."""
    return {
        "max_tokens": 1,
        "temperature": 0,
        "allowed_token_ids": list(candidates),
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def _candidates(prompt: Prompt) -> list[int]:
    candidates = list(prompt.slots[-1].candidates)
    if not candidates:
        raise ExportError("these tags are answered with whole names; requests are made for option symbols only")
    return candidates


def _shared_candidates(prompts: Sequence[Prompt]) -> list[int]:
    """Return the candidates of all prompts: SGLang takes one list of them a request."""
    found = [_candidates(prompt) for prompt in prompts]
    if any(one != found[0] for one in found):
        raise ExportError("prompts have other candidates; make a request for each list of options")
    return found[0]


def _unused(model: MarkupModel, prompts: Iterable[Prompt]) -> int:
    used = {i for prompt in prompts for i in prompt.ids}
    free = next((i for i in model.backbone.vocabulary.tolist() if i not in used), None)
    if free is None:
        raise ExportError("these prompts use every token of the vocabulary; make several requests of them")
    return int(free)
