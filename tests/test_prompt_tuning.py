"""Prompt tuning as a template of one tag: the plain prompt stays, and it is what PEFT's prompt tuning computes.

One difference is left where a tokenizer begins every text with a token of its own (BOS, CLS): ours stands before the
block, as it stands before any prompt, whereas PEFT puts its virtual tokens before it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from tokenizers import processors

from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.episodes import Demo, Episode, EpisodeConfig, EpisodeSampler, Option, Query
from icl_markup.markup import Answers
from icl_markup.model import MarkupModel
from icl_markup.template import Template
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig, run_warmup
from tests.conftest import byte_level_tokenizer, tiny_backbone, tiny_task

NAME, PLAIN = "prompt_tuning_letters", "plain_letters_text_label"
PAIRS = [(NAME, PLAIN, "symbols"), ("prompt_tuning_words", "plain_words_text_label", "names")]
OPTIONS = (Option("lost card"), Option("opening hours"), Option("weather"))
EPISODES = [
    Episode(OPTIONS, (Demo("will it rain", 2),), (Query("where is my bank card", 0),)),
    Episode(OPTIONS[:2], (), (Query("are you open on Sunday, and until when", 1),)),
]


def without_first_token() -> Backbone:
    """A causal backbone whose tokenizer puts nothing around a text."""
    tokenizer = copy.deepcopy(byte_level_tokenizer(mask=False))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    backbone = Backbone(transformers.LlamaForCausalLM(config), tokenizer, "causal", name="tiny")
    assert backbone.layout.prefix == () == backbone.layout.suffix
    return backbone


@pytest.mark.parametrize(("name", "default"), [(NAME, "markup_letters"), ("prompt_tuning_words", "markup_words")])
def test_it_has_as_many_parameters_as_the_default_tags(backbone: Backbone, name: str, default: str) -> None:
    tuned, tags = (MarkupModel(backbone, template, answers="names") for template in (name, default))
    assert [tag.width for tag in tuned.template.tags] == [10]
    assert tuned.table.rows.shape == tags.table.rows.shape


@pytest.mark.parametrize(("name", "wording", "answers"), PAIRS)
def test_what_follows_the_block_is_the_plain_prompt_token_for_token(
    backbone: Backbone, name: str, wording: str, answers: Answers
) -> None:
    tuned, plain = (MarkupModel(backbone, template, answers=answers) for template in (name, wording))
    block = tuple(tuned.table.ids("<prompt>"))
    sampler = EpisodeSampler([tiny_task()], EpisodeConfig(n_way=(2, 3), k_shot=(0, 1), none_option=0.5), seed=2)
    for episode in (sampler.episode(0, i) for i in range(20)):
        ours, theirs = tuned.markup.compose(episode), plain.markup.compose(episode)
        first = len(backbone.layout.prefix)
        assert ours.ids == (*theirs.ids[:first], *block, *theirs.ids[first:])
        moved = 0 if backbone.kind == "seq2seq" else len(block)
        assert ours.slots == tuple(replace(slot, position=slot.position + moved) for slot in theirs.slots)


@pytest.mark.parametrize(("name", "wording"), [pair[:2] for pair in PAIRS])
def test_the_template_differs_from_the_plain_one_in_the_block_alone(name: str, wording: str) -> None:
    tuned, plain = Template.load(name), Template.load(wording)
    assert tuned.head[0].value == "<prompt>"
    assert tuned.head[1:] == plain.head
    assert (tuned.option, tuned.demo, tuned.query, tuned.tail) == (plain.option, plain.demo, plain.query, plain.tail)


def test_logits_and_gradients_are_those_of_peft() -> None:
    backbone = without_first_token()
    ours = MarkupModel(backbone, NAME)
    prompts = [ours.markup.compose(episode) for episode in EPISODES]
    terms = ours.loss_terms(prompts, EPISODES, True)
    loss = torch.nn.functional.cross_entropy(terms.scores, terms.targets, reduction="sum")
    loss.backward()

    rows = ours.table.rows.detach()
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(rows))
    peft = get_peft_model(copy.deepcopy(backbone.model), settings)
    virtual = peft.prompt_encoder["default"].embedding.weight
    assert virtual.shape == rows.shape
    with torch.no_grad():
        virtual.copy_(rows)
    plain = MarkupModel(backbone, PLAIN)
    bare = [plain.markup.compose(episode) for episode in EPISODES]
    batch = Batch.of_prompts(bare, pad_id=1)
    logits = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.shape[1] == len(rows) + batch.input_ids.shape[1]
    at_slots = logits[batch.rows, len(rows) + batch.positions].gather(1, batch.candidates)
    theirs = at_slots.masked_fill(~batch.candidate_mask, float("-inf"))
    torch.nn.functional.cross_entropy(theirs, batch.targets, reduction="sum").backward()

    assert torch.allclose(terms.scores, theirs, atol=1e-5)
    assert virtual.grad.abs().max() > 1e-3
    assert torch.allclose(ours.table.rows.grad, virtual.grad, atol=1e-6, rtol=1e-4)
    last = [int(batch.attention_mask[row].sum()) - 1 for row in range(2)]
    queries = [i for i, is_query in enumerate(batch.is_query) if is_query]
    assert [int(batch.positions[i]) for i in queries] == last
    assert not torch.allclose(plain.loss_terms(bare, EPISODES, True).scores, theirs, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_an_ordinary_warm_up_trains_the_block_alone(kind: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(kind)
    checksum, before = backbone.checksum(), MarkupModel(backbone, NAME).table.rows.detach()
    config = WarmupConfig(
        tasks=[], output=str(tmp_path), template=NAME, episodes=EpisodeConfig(n_way=(2, 3), k_shot=(0, 1)),
        optimiser=OptimiserConfig(steps=2, learning_rate=0.5, warmup_steps=0, batch_tokens=600, window=8),
        validation=ValidationConfig(every=2, episodes=2, n_way=2),
    )  # fmt: skip
    result = run_warmup(config, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)
    assert backbone.checksum() == checksum
    assert (result.model.table.rows.detach() != before).any(dim=1).all()
    loaded = MarkupModel.from_tags(result.folder, backbone)
    assert torch.equal(loaded.table.rows, result.model.table.rows)
