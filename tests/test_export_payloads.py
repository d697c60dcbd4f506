"""Requests for vLLM and SGLang, read the way those engines read them, and answered by transformers in their place."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import pytest
import torch

from icl_markup.episodes import Option, Query
from icl_markup.errors import ExportError
from icl_markup.export_merged import export_merged
from icl_markup.export_payloads import (
    prompt_embeds,
    sglang_ids_request,
    sglang_score_request,
    vllm_embeds_request,
    vllm_ids_request,
)
from icl_markup.exported import Exported
from icl_markup.model import MarkupModel
from icl_markup.prompt import Prompt
from tests.conftest import tiny_backbone
from tests.test_export_merged import EPISODE, QUERIES, half_llama, tied_llama, warmed


@pytest.fixture
def model() -> MarkupModel:
    return warmed(tied_llama())


def prompts_of(model: MarkupModel) -> list[Prompt]:
    return model.markup.compose_each(replace(EPISODE, queries=tuple(map(Query, QUERIES))))


def live_scores(model: MarkupModel) -> list[torch.Tensor]:
    asked = replace(EPISODE, queries=tuple(map(Query, QUERIES)))
    return [one.scores for one in model.scores([asked])[0]]


def test_vllm_loads_the_embeddings_safely_and_the_bare_model_answers_as_ours(model: MarkupModel) -> None:
    for prompt, live in zip(prompts_of(model), live_scores(model), strict=True):
        body = json.loads(json.dumps(vllm_embeds_request(model, prompt, "bare")))
        # As vLLM's `safe_load_prompt_embeds` does: strict base64, weights only, two dimensions, the model's width.
        raw = base64.b64decode(body["prompt_embeds"], validate=True)
        tensor = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        assert tensor.layout == torch.strided
        assert tensor.shape == (len(prompt.ids), model.backbone.width)
        with torch.inference_mode():
            logits = model.backbone.model(inputs_embeds=tensor[None]).logits[0, -1]
        torch.testing.assert_close(logits[body["allowed_token_ids"]], live)
        assert (body["max_tokens"], body["temperature"]) == (1, 0)
        assert "prompt" not in body


def test_embeddings_are_in_the_type_of_the_weights() -> None:
    model = warmed(half_llama())
    found = prompt_embeds(model, prompts_of(model)[0])
    assert found.dtype == torch.bfloat16
    first = model.table.rows[0].detach().to(torch.bfloat16)
    assert torch.equal(found[prompts_of(model)[0].ids.index(model.table.first_id)], first)


def test_sglang_puts_the_vectors_where_placeholders_stand_and_answers_as_ours(model: MarkupModel) -> None:
    body = json.loads(json.dumps(sglang_score_request(model, prompts_of(model), "bare")))
    assert body["query"] == []
    table = model.backbone.embedding.weight
    labels = body["label_token_ids"]
    assert all(type(label) is int for label in labels)  # `ScoringRequest.label_token_ids: Optional[List[int]]`
    for ids, vectors, live in zip(body["items"], body["item_embed_overrides"], live_scores(model), strict=True):
        # As SGLang's `_resolve_overrides_for_sequence` does: one vector for each placeholder, in order.
        at = [i for i, token in enumerate(ids) if token == body["embed_override_token_id"]]
        assert len(at) == len(vectors) > 0
        assert max(ids) < len(model.backbone.tokenizer)
        embeds = table[torch.tensor(ids)].detach().clone()
        embeds[at] = torch.tensor(vectors)
        with torch.inference_mode():
            logits = model.backbone.model(inputs_embeds=embeds[None]).logits[0, -1]
        torch.testing.assert_close(logits[labels], live)


def test_the_placeholder_stands_for_nothing_else(model: MarkupModel) -> None:
    prompts = prompts_of(model)
    placeholder = sglang_score_request(model, prompts, "bare")["embed_override_token_id"]
    assert all(placeholder not in prompt.ids for prompt in prompts)
    assert placeholder not in model.backbone.encoder.reserved_ids


def test_requests_for_a_merged_checkpoint_hold_its_ids(model: MarkupModel, tmp_path) -> None:
    exported = Exported.load(export_merged(model, tmp_path / "merged").folder)
    prompts = exported.prompts(EPISODE, QUERIES)
    assert [vllm_ids_request(prompt, "m")["prompt"] for prompt in prompts] == [list(p.ids) for p in prompts]
    body = sglang_ids_request(prompts, "m")
    assert body["items"] == [list(prompt.ids) for prompt in prompts]
    assert all(body["label_token_ids"] == list(prompt.slots[-1].candidates) for prompt in prompts)
    more = replace(EPISODE, options=(*EPISODE.options, Option("something else")))
    with pytest.raises(ExportError, match="a request for each list of options"):
        sglang_ids_request([*prompts, *exported.prompts(more, QUERIES)], "m")
    assert set(exported.placement.all_ids) & set(body["items"][0])


def test_what_the_engines_cannot_do_is_an_error(model: MarkupModel) -> None:
    for name in ("bert", "t5"):
        other = warmed(tiny_backbone(name))
        with pytest.raises(ExportError, match="score causal models"):
            vllm_embeds_request(other, other.markup.compose_each(_one())[0], "x")
    named = MarkupModel(model.backbone, "markup_letters", answers="names")
    with pytest.raises(ExportError, match="whole names"):
        vllm_embeds_request(named, named.markup.compose_each(_one())[0], "x")
    with pytest.raises(ExportError, match="no prompt"):
        sglang_score_request(model, [], "x")
    plain = MarkupModel(model.backbone, "plain_letters_multiple_choice")
    with pytest.raises(ExportError, match="no tags"):
        prompt_embeds(plain, plain.markup.compose_each(_one())[0])


def _one():
    return replace(EPISODE, queries=(Query(QUERIES[0]),))
