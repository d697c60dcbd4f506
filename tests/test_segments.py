"""Segment-local attention: parts of a prompt read alone, and queries that share a prompt score as if they did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_markup import scoring
from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.batching import Batch
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import BackboneError, PromptError
from icl_markup.model import MarkupModel
from icl_markup.names import name_scores
from icl_markup.prompt import Prompt
from icl_markup.segments import HEAD, PADDING, encoder_layers, position_ids, segment_attention, visible
from icl_markup.template import Template
from tests.conftest import byte_level_tokenizer, tiny_backbone, wordpiece_tokenizer
from tests.test_text import FAST

MASKED = ("bert", "roberta")
LOCAL = 2
TAIL = Template.parse(Template.load("plain_seen_03").source + "@tail\nwhich is it, then?\n", "tail")
TEMPLATES = ("markup", "plain_seen_03", TAIL)
NAMES = ("markup", "plain_seen_03", "tail")
EPISODE = Episode(
    (Option("lost card"), Option("opening hours"), Option("weather")),
    (Demo("I lost my card", 0), Demo("are you open on Sunday, and when", 1), Demo("will it rain", 2)),
    (Query("where is it", 0), Query("when do you close, and what time do you open", 1), Query("is it cold", 2)),
)


def network(kind: str, *, layers: int = 3, positions: int = 258, seed: int = 0) -> Any:
    """A masked model with weights large enough for a leak between segments to show."""
    torch.manual_seed(seed)
    tokenizer = wordpiece_tokenizer() if kind == "bert" else byte_level_tokenizer(mask=True)
    sizes = {"max_position_embeddings": positions, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    wide = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "initializer_range": 0.3,
    }  # fmt: skip
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **wide)), tokenizer
    if kind == "roberta":
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes, **wide)), tokenizer
    if kind == "electra":
        return transformers.ElectraForMaskedLM(
            transformers.ElectraConfig(embedding_size=32, **sizes, **wide)
        ), tokenizer
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            dim=32, hidden_dim=48, n_layers=layers, n_heads=4, initializer_range=0.3, **sizes
        )
        return transformers.DistilBertForMaskedLM(config), tokenizer
    if kind == "mpnet":  # relative positions beside its position embeddings
        model = transformers.MPNetForMaskedLM(transformers.MPNetConfig(**sizes, **wide))
        torch.nn.init.normal_(model.mpnet.encoder.relative_attention_bias.weight)
        return model, tokenizer
    if kind == "albert":  # one layer, used again and again
        return transformers.AlbertForMaskedLM(transformers.AlbertConfig(embedding_size=32, **sizes, **wide)), tokenizer
    assert kind == "modernbert"  # rotary positions
    special = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes, **special, **wide)), tokenizer


def segmented(
    kind: str,
    local: int = LOCAL,
    *,
    attention: str = "eager",
    anchors: bool = False,
    global_heads: int = 0,
    **options: Any,
) -> Backbone:
    """A backbone whose lower layers read by segments; `local` 0 leaves the setting away."""
    sizes = {name: options.pop(name) for name in ("layers", "positions", "seed") if name in options}
    model, tokenizer = network(kind, **sizes)
    model.set_attn_implementation(attention)
    if local:
        model.config.icl_markup = {"local_layers": local, "anchors": anchors, "global_heads": global_heads}
    return Backbone(model, tokenizer, "masked", name=f"segmented-{kind}", **options)


backbone_of = lru_cache(segmented)


def alone(episode: Episode) -> list[Episode]:
    return [replace(episode, queries=(query,)) for query in episode.queries]


@torch.no_grad()
def logits(model: MarkupModel, prompts: Sequence[Prompt]) -> torch.Tensor:
    return model.backbone.candidate_logits(Batch.of_prompts(prompts, model.pad_id, all_slots=False), model.table)


@torch.no_grad()
def states(model: MarkupModel, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, ...]:
    """Hidden states after the embeddings and after each layer, (prompts, longest, width) each."""
    batch = Batch.of_prompts(prompts, model.pad_id)
    assert batch.segments is not None
    with segment_attention(model.backbone.model, batch.segments) as reading:
        out = model.backbone.model(batch.input_ids, batch.attention_mask, output_hidden_states=True, **reading.inputs)
    return tuple(out.hidden_states)


def of_segment(prompt: Prompt, values: torch.Tensor, segment: int) -> torch.Tensor:
    return values[[i for i, found in enumerate(prompt.segments) if found == segment]]


def rebuilt(prompt: Prompt, segments: Sequence[int]) -> Prompt:
    """The head, these segments in this order, and the final special tokens."""
    first = next(i for i, piece in enumerate(prompt.pieces) if piece.segment != HEAD)
    last = next(i for i in reversed(range(len(prompt.pieces))) if prompt.pieces[i].segment != HEAD)
    middle = [piece for segment in segments for piece in prompt.pieces if piece.segment == segment]
    assert all(piece.segment != HEAD for piece in prompt.pieces[first : last + 1])
    pieces = (*prompt.pieces[:first], *middle, *prompt.pieces[last + 1 :])
    slots, length = [], 0
    for piece in pieces:
        if piece.kind == "slot":
            slots.append(replace(prompt.slots[-piece.segment - 1], position=length))
        length += len(piece.ids)
    return Prompt(pieces, tuple(slots))


def hooks(model: torch.nn.Module) -> int:
    """How many hooks are ours; transformers has some of its own."""
    found = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return sum(hook.__module__ == "icl_markup.segments" for hook in found)


# What a segment depends on


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
@pytest.mark.parametrize("local", [1, LOCAL, 3])
@pytest.mark.parametrize("kind", MASKED)
def test_queries_in_one_prompt_score_as_they_do_alone(kind: str, local: int, template: Any) -> None:
    model = MarkupModel(backbone_of(kind, local), template)
    together = logits(model, [model.markup.compose(EPISODE)])
    singly = torch.cat([logits(model, [model.markup.compose(single)]) for single in alone(EPISODE)])
    assert torch.allclose(together, singly, atol=1e-5)
    assert together.std() > 0.05, "the scores say nothing"


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
@pytest.mark.parametrize("local", [1, LOCAL, 3])
@pytest.mark.parametrize("kind", MASKED)
def test_among_anchors_too_queries_score_as_they_do_alone(kind: str, local: int, template: Any) -> None:
    model = MarkupModel(backbone_of(kind, local, anchors=True, global_heads=2), template)
    prompt = model.markup.compose(EPISODE)
    together, moved = logits(model, [prompt]), logits(model, [rebuilt(prompt, [6, 2, 1, 5, 3, 4, -1, -2, -3])])
    singly = torch.cat([logits(model, [model.markup.compose(single)]) for single in alone(EPISODE)])
    assert torch.allclose(together, singly, atol=1e-5)
    if template != TAIL:  # whose tail `rebuilt` leaves away
        assert torch.allclose(together, moved, atol=1e-5)
    assert together.std() > 0.05, "the scores say nothing"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_global_layers_that_look_at_anchors_do_so_as_if_all_tokens_were_there(attention: str) -> None:
    """The upper layers are given the head, symbols and slots alone; here they are given everything, behind a mask."""
    backbone = segmented("bert", attention=attention, anchors=True, global_heads=2, layers=4)
    model = MarkupModel(backbone, "plain_seen_03")
    prompts = [model.markup.compose(EPISODE), *map(model.markup.compose, alone(EPISODE)[:1])]
    batch = Batch.of_prompts(prompts, model.pad_id, all_slots=False)
    assert batch.segments is not None and batch.anchors is not None
    local, everywhere = visible(batch.segments)
    seen = batch.anchors | (batch.segments == HEAD)
    bert, head = backbone.model.bert, backbone.model.cls
    masks = [
        torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        for mask in (local, everywhere & seen[:, None, None, :])
    ]
    with torch.no_grad():
        hidden = bert.embeddings(batch.input_ids, position_ids=position_ids(batch.segments, 258))
        for number, layer in enumerate(bert.encoder.layer):
            assert layer.attention.self.num_attention_heads == (4 if number < LOCAL else 2)
            hidden = layer(hidden, attention_mask=masks[number >= LOCAL])
        wanted = head(hidden)[batch.rows, batch.positions].gather(1, batch.candidates)
    found = logits(model, prompts)
    assert torch.allclose(found[batch.candidate_mask], wanted[batch.candidate_mask], atol=1e-5)
    unmarked = replace(batch, anchors=None)
    assert not torch.allclose(backbone.candidate_logits(unmarked)[batch.candidate_mask], wanted[batch.candidate_mask])


def test_heads_of_global_layers_that_cannot_be_are_refused() -> None:
    for heads, message in ((5, "global_heads .* is 5, which does not fit"), (-1, "global_heads .* is -1")):
        with pytest.raises(BackboneError, match=message):
            segmented("bert", global_heads=heads)


@pytest.mark.parametrize("kind", MASKED)
def test_without_the_setting_they_do_not(kind: str) -> None:
    """The premise of the test above."""
    model = MarkupModel(backbone_of(kind, 0), "plain_seen_03")
    together = logits(model, [model.markup.compose(EPISODE)])
    singly = torch.cat([logits(model, [model.markup.compose(single)]) for single in alone(EPISODE)])
    assert (together - singly).abs().max() > 0.05


@pytest.mark.parametrize("kind", MASKED)
@settings(FAST, max_examples=10)
@given(order=st.permutations(range(1, 7)), queries=st.permutations((-1, -2, -3)))
def test_the_order_of_segments_does_not_matter(kind: str, order: list[int], queries: list[int]) -> None:
    model = MarkupModel(backbone_of(kind), "plain_seen_03")
    prompt = model.markup.compose(EPISODE)
    before, after = logits(model, [prompt]), logits(model, [rebuilt(prompt, [*order, *queries])])
    assert torch.allclose(before[[-q - 1 for q in queries]], after, atol=1e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_each_option_and_demonstration_matters(kind: str) -> None:
    model = MarkupModel(backbone_of(kind), "plain_seen_03")
    prompt = model.markup.compose(EPISODE)
    before = logits(model, [prompt])
    for left_out in range(1, 7):
        after = logits(model, [rebuilt(prompt, [*(s for s in range(1, 7) if s != left_out), -1, -2, -3])])
        assert (before - after).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("template", TEMPLATES[1:], ids=NAMES[1:])
@pytest.mark.parametrize("kind", MASKED)
def test_nothing_of_a_query_reaches_another_part(kind: str, template: Any) -> None:
    model = MarkupModel(backbone_of(kind), template)
    first, _, third = EPISODE.queries
    prompts = [
        model.markup.compose(replace(EPISODE, queries=(first, other, third)))
        for other in (Query("will it be cold"), Query("nobody answers my letters and I want to complain"))
    ]
    for before, after in zip(*(states(model, [prompt]) for prompt in prompts), strict=True):
        for segment in {*prompts[0].segments} - {-2}:
            pair = [of_segment(p, v[0], segment) for p, v in zip(prompts, (before, after), strict=True)]
            assert torch.allclose(*pair, atol=1e-5)
    assert not torch.allclose(*(logits(model, [prompt])[1] for prompt in prompts), atol=0.01)


@pytest.mark.parametrize("kind", MASKED)
def test_in_local_layers_a_segment_is_what_it_is_behind_the_head_alone(kind: str) -> None:
    model = MarkupModel(backbone_of(kind), "plain_seen_03")
    prompt = model.markup.compose(EPISODE)
    whole = states(model, [prompt])
    query_alone = {s: states(model, [rebuilt(prompt, [s])]) for s in (-1, -2, -3)}
    for segment in {*prompt.segments} - {HEAD}:
        shown = [segment] if segment < 0 else [segment, -1]
        small = rebuilt(prompt, shown)
        lonely = query_alone[segment] if segment < 0 else states(model, [small])
        for layer in range(len(whole)):
            pair = of_segment(prompt, whole[layer][0], segment), of_segment(small, lonely[layer][0], segment)
            assert torch.allclose(*pair, atol=1e-5) == (layer <= LOCAL)


@pytest.mark.parametrize("kind", MASKED)
def test_in_local_layers_a_demonstration_does_not_depend_on_the_others(kind: str) -> None:
    model = MarkupModel(backbone_of(kind), "markup")
    table = model.table
    assert table is not None
    episodes = [EPISODE, replace(EPISODE, demos=(Demo("sunny or not", 2), EPISODE.demos[1], Demo("opening times", 1)))]
    prompts = [model.markup.compose(episode) for episode in episodes]
    from icl_markup.tags import substituted

    with substituted(model.backbone.embedding, table):
        found = [states(model, [prompt]) for prompt in prompts]
    for layer in range(4):
        pair = [of_segment(p, v[layer][0], 5) for p, v in zip(prompts, found, strict=True)]
        assert torch.allclose(*pair, atol=1e-5) == (layer <= LOCAL)


# Positions and padding


def test_positions_begin_anew_behind_the_head() -> None:
    segments = torch.tensor(
        [
            [0, 0, 0, 1, 1, 2, 2, 2, 2, -1, -1, -2, 0, 0],
            [0, 1, 1, 2, -1, -1, -1, 0, *[PADDING] * 6],
            [1, 1, 2, 2, 2, -1, -1, -1, -1, -1, -1, -1, -1, 0],
            [0] * 14,
        ]
    )
    expected = torch.tensor(
        [
            [0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 4, 3, 3, 4],
            [0, 1, 2, 1, 1, 2, 3, 1, *range(1, 7)],
            [0, 1, 0, 1, 2, *range(8), 0],
            [*range(14)],
        ]
    )
    assert torch.equal(position_ids(segments, 100), expected)
    assert torch.equal(position_ids(segments, 4), expected.clamp(max=3))


@pytest.mark.parametrize("kind", MASKED)
def test_a_prompt_of_unknown_segments_is_read_as_by_the_model_itself(kind: str) -> None:
    """All of it is head then; what RoBERTa adds to a position must be added here too."""
    local, plain = backbone_of(kind), backbone_of(kind, 0)
    lines = [plain.vocabulary[:40].tolist(), plain.vocabulary[40:53].tolist()]
    batch = Batch.of_ids(
        lines, [(0, 7), (1, 12)], plain.vocabulary[:20].expand(2, -1), pad_id=plain.tokenizer.pad_token_id
    )
    with torch.no_grad():
        assert torch.allclose(local.candidate_logits(batch), plain.candidate_logits(batch), atol=1e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_a_segment_longer_than_the_position_table_shares_its_last_position(kind: str) -> None:
    backbone = segmented(kind, positions=40)
    model = MarkupModel(backbone, "plain_heldout_05")
    long = replace(EPISODE, queries=(Query("card " * 60), Query("is it cold")))
    prompt = model.markup.compose(long)
    assert (prompt.shortened, prompt.dropped) == (0, 0)
    assert len(prompt.ids) > 100
    batch = Batch.of_prompts([prompt], model.pad_id)
    assert batch.segments is not None
    with segment_attention(backbone.model, batch.segments) as reading:
        assert reading.inputs["position_ids"].max() == 39
        assert reading.inputs["position_ids"].min() == (0 if kind == "bert" else 2)
    assert torch.isfinite(logits(model, [prompt])).all()
    whole = segmented(kind, positions=258)
    table = next(m for n, m in whole.model.named_modules() if n.endswith("position_embeddings")).weight
    small = next(m for n, m in backbone.model.named_modules() if n.endswith("position_embeddings")).weight
    whole.model.load_state_dict(
        {n: v for n, v in backbone.model.state_dict().items() if v.shape != small.shape}, strict=False
    )
    with torch.no_grad():
        table[:40], table[40:] = small, small[39]
    assert torch.allclose(logits(MarkupModel(whole, "plain_heldout_05"), [prompt]), logits(model, [prompt]), atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MASKED)
def test_neither_padding_nor_the_rest_of_a_batch_changes_anything(kind: str, attention: str) -> None:
    model = MarkupModel(backbone_of(kind, attention=attention), "plain_seen_03")
    episodes = [*alone(EPISODE), replace(EPISODE, demos=()), replace(EPISODE, options=EPISODE.options[:2], demos=())]
    prompts = [model.markup.compose(episode) for episode in episodes]
    assert all(torch.isfinite(layer).all() for layer in states(model, prompts))
    together = logits(model, prompts)
    singly = [row for prompt in prompts for row in logits(model, [prompt])]
    for row, own in zip(together, singly, strict=True):
        assert torch.allclose(row[: len(own)], own, atol=1e-5)
        assert (row[len(own) :] == float("-inf")).all()


# How it is computed


@pytest.mark.parametrize("kind", MASKED)
def test_eager_and_scaled_dot_product_attention_agree(kind: str) -> None:
    prompts, found = None, []
    for attention in ("eager", "sdpa"):
        model = MarkupModel(backbone_of(kind, attention=attention), "plain_seen_03")
        prompts = prompts or [model.markup.compose(EPISODE), *map(model.markup.compose, alone(EPISODE))]
        found.append(logits(model, prompts))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MASKED)
def test_autocast_to_bf16_changes_scores_by_rounding_alone(kind: str, attention: str) -> None:
    exact = MarkupModel(backbone_of(kind), "markup")
    rounded = MarkupModel(backbone_of(kind, attention=attention, precision="bf16"), "markup")
    prompts = [exact.markup.compose(EPISODE), *map(exact.markup.compose, alone(EPISODE))]
    wanted, found = logits(exact, prompts), logits(rounded, prompts)
    assert torch.allclose(found, wanted, atol=0.1 * float(wanted.std()))
    assert torch.allclose(found[:3], found[3:], atol=0.1 * float(wanted.std()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_work(dtype: torch.dtype) -> None:
    network_, tokenizer = network("bert")
    network_.config.icl_markup = {"local_layers": LOCAL}
    model = MarkupModel(Backbone(network_.to(dtype), tokenizer, "masked"), "markup")
    exact = MarkupModel(backbone_of("bert"), "markup")
    prompts = [exact.markup.compose(EPISODE)]
    wanted = logits(exact, prompts)
    assert torch.allclose(logits(model, prompts), wanted, atol=0.15 * float(wanted.std()))


def saved(kind: str, folder: Path) -> Path:
    backbone = backbone_of(kind)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MASKED)
def test_gradients_reach_the_tags_and_checkpointing_does_not_change_them(kind: str, tmp_path: Path) -> None:
    folder, gradients = saved(kind, tmp_path), []
    for checkpointing in (False, True):
        config = BackboneConfig(str(folder), precision="none", device="cpu", gradient_checkpointing=checkpointing)
        backbone = Backbone.load(config)
        assert (backbone.local_layers, backbone.max_length) == (LOCAL, 2048)
        model = MarkupModel(backbone, "markup")
        assert model.table is not None
        batch = Batch.of_prompts([model.markup.compose(EPISODE)], model.pad_id)
        scores = backbone.candidate_logits(batch, model.table)
        assert hooks(backbone.model) == 0
        torch.nn.functional.cross_entropy(scores, batch.targets).backward()
        gradients.append(model.table.rows.grad)
    assert torch.allclose(*gradients, atol=1e-6)
    assert (gradients[0].abs().sum(1) > 0).all()


def test_a_recomputation_that_would_lose_the_mask_is_refused() -> None:
    """In transformers 5.0 it calls a layer with its hooks anew, when ours are gone."""
    backbone = segmented("bert")

    class Recomputing(type(backbone.model.bert.encoder.layer[0])):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    model = MarkupModel(backbone, "markup")
    prompt = model.markup.compose(EPISODE)
    for layer in backbone.model.bert.encoder.layer:
        layer.__class__ = Recomputing
    backbone.model.gradient_checkpointing_enable()
    assert torch.isfinite(logits(model, [prompt])).all(), "it does not recompute in evaluation mode"
    backbone.model.train()
    with pytest.raises(BackboneError, match="gradient_checkpointing off"):
        logits(model, [prompt])


@pytest.mark.parametrize("config", [None, {}, {"local_layers": 0}, {"local_layers": 0, "max_length": 7}])
@pytest.mark.parametrize("kind", MASKED)
def test_without_local_layers_the_model_is_called_as_ever(
    kind: str, config: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network_, tokenizer = network(kind)
    if config is not None:
        network_.config.icl_markup = config
    backbone = Backbone(network_, tokenizer, "masked")
    monkeypatch.setattr("icl_markup.backbone.segment_attention", None)
    model = MarkupModel(backbone, "plain_seen_03")
    prompts = [model.markup.compose(EPISODE), *map(model.markup.compose, alone(EPISODE))]
    batch = Batch.of_prompts(prompts, model.pad_id)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    given: list[dict[str, Any]] = []
    with torch.no_grad():
        states_ = getattr(network_, kind)(**inputs)[0][batch.rows, batch.positions]
        head = network_.cls.predictions.transform if kind == "bert" else network_.lm_head
        wanted = head(states_) if kind == "bert" else head.layer_norm(torch.nn.functional.gelu(head.dense(states_)))
        wanted = backbone._logits_of(wanted, batch.candidates)
        network_.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
        assert torch.allclose(backbone.candidate_logits(batch), wanted, atol=1e-6)
    assert [set(kwargs) for kwargs in given] == [set(inputs)]
    assert backbone.max_length == 258 - (0 if kind == "bert" else 2)


@pytest.mark.parametrize("config", [{"local_layers": 1}, {"local_layers": 99}, "nonsense"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_other_kinds_do_not_mind_the_setting(kind: str, config: Any) -> None:
    plain = tiny_backbone(kind)
    other = tiny_backbone(kind)
    other.model.config.icl_markup = config
    other = Backbone(other.model, other.tokenizer, plain.kind, max_length=plain.max_length)
    assert other.local_layers == 0
    for answers in ("symbols", "names"):
        found = [MarkupModel(b, "markup", answers=answers).scores([EPISODE])[0] for b in (plain, other)]
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(*found, strict=True))


def test_hooks_are_gone_also_after_an_error() -> None:
    backbone = backbone_of("bert")
    model = MarkupModel(backbone, "plain_seen_03")
    batch = Batch.of_prompts([model.markup.compose(EPISODE)], model.pad_id)
    assert batch.segments is not None
    with pytest.raises(KeyError), segment_attention(backbone.model, batch.segments):
        assert hooks(backbone.model) == 3, "one a layer"
        raise KeyError
    assert hooks(backbone.model) == 0
    with pytest.raises(IndexError), torch.no_grad():
        backbone.candidate_logits(replace(batch, input_ids=batch.input_ids + 10**6))
    assert hooks(backbone.model) == 0
    backbone.model.config.icl_markup = {"local_layers": -1}
    try:
        with pytest.raises(BackboneError), segment_attention(backbone.model, batch.segments):
            pass
    finally:
        backbone.model.config.icl_markup = {"local_layers": LOCAL}
    assert hooks(backbone.model) == 0


# Which models can do it


@pytest.mark.parametrize("kind", ["electra", "distilbert"])
def test_kin_of_bert_can_do_it(kind: str) -> None:
    model = MarkupModel(segmented(kind), "plain_seen_03")
    together = logits(model, [model.markup.compose(EPISODE)])
    singly = torch.cat([logits(model, [model.markup.compose(single)]) for single in alone(EPISODE)])
    assert torch.allclose(together, singly, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("mpnet", "order of segments"), ("albert", "not like theirs"), ("modernbert", "not like theirs")],
)
def test_a_model_that_cannot_is_refused_at_once(kind: str, message: str) -> None:
    assert segmented(kind, 0).local_layers == 0
    with pytest.raises(BackboneError, match=message):
        segmented(kind)


def test_an_attention_that_takes_no_mask_of_ours_is_refused() -> None:
    model, tokenizer = network("bert")
    model.config.icl_markup = {"local_layers": 1}
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BackboneError, match="eager or sdpa, not flash_attention_2"):
        encoder_layers(model)
    with pytest.raises(BackboneError, match="eager or sdpa, not flash_attention_2"):
        Backbone(model, tokenizer, "masked")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"local_layers": -1}, "icl_markup.local_layers .* is -1; it must be a whole number of at least 0"),
        ({"local_layers": 4}, "icl_markup.local_layers .* is 4, but it has 3 layers"),
        ({"local_layers": 1.0}, "icl_markup.local_layers .* is 1.0"),
        ({"local_layers": "1"}, "icl_markup.local_layers .* is '1'"),
        ({"local_layers": True}, "icl_markup.local_layers .* is True"),
        ({"local_layers": None}, "icl_markup.local_layers .* is None"),
        ({"local_layers": 1, "max_length": 0}, "icl_markup.max_length .* is 0"),
        ({"local_layers": 1, "max_length": "long"}, "icl_markup.max_length .* is 'long'"),
        ({"local_layers": 1, "anchors": 1}, "icl_markup.anchors .* is 1; it must be true or false"),
        ({"local_layer": 1}, "icl_markup .* unknown key 'local_layer'; did you mean 'local_layers'"),
        ([1], "icl_markup .* mapping"),
        (None, "icl_markup .* mapping"),
        ("local_layers", "icl_markup .* mapping"),
    ],
)
def test_settings_that_cannot_be_are_reported_by_their_key(config: Any, message: str) -> None:
    model, tokenizer = network("bert")
    model.config.icl_markup = config
    with pytest.raises(BackboneError, match=message):
        Backbone(model, tokenizer, "masked")


def test_the_longest_prompt_is_the_configurations_unless_one_is_asked_for() -> None:
    model, tokenizer = network("bert")
    model.config.icl_markup = {"local_layers": 1, "max_length": 700}
    assert Backbone(model, tokenizer, "masked").max_length == 700
    assert Backbone(model, tokenizer, "masked", max_length=90).max_length == 90


# Whole names


@torch.no_grad()
def names_one_by_one(model: MarkupModel, episode: Episode) -> torch.Tensor:
    """Scores of one query's options: each name's masks in a prompt of its own."""
    prompt = model.markup.compose(episode)
    (slot,) = prompt.slots
    place, scores = slot.position, []
    for option in episode.options:
        name = model.markup.name_ids(option.name, slot.spaced)
        ids, segments = list(prompt.ids), list(prompt.segments)
        ids[place : place + 1] = [ids[place]] * len(name)
        segments[place : place + 1] = [segments[place]] * len(name)
        slots = [(0, place + k) for k in range(len(name))]
        batch = Batch.of_ids([ids], slots, torch.zeros(len(name), 1).long(), targets=name, segments=[segments])
        scores.append(model.backbone.token_log_probs(batch, model.table).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
@pytest.mark.parametrize("kind", MASKED)
def test_whole_names_score_as_they_do_one_by_one(kind: str, template: Any) -> None:
    model = MarkupModel(backbone_of(kind), template, answers="names")
    episode = replace(EPISODE, options=(*EPISODE.options, Option("card lost"), Option("it")))
    wanted = [names_one_by_one(model, single) for single in alone(episode)]
    with torch.no_grad():
        prompts = [model.markup.compose(episode), model.markup.compose(alone(EPISODE)[0])]
        found = name_scores(model.backbone, model.markup, prompts, [episode, EPISODE], model.table, True)
    assert torch.allclose(found[:3], torch.stack(wanted), atol=1e-5)
    assert torch.allclose(found[3, :3], names_one_by_one(model, alone(EPISODE)[0]), atol=1e-5)
    assert (found[3, 3:] == float("-inf")).all()
    [scores] = model.scores([episode])
    assert all(torch.allclose(one.scores, row, atol=1e-5) for one, row in zip(scores, wanted, strict=True))


# Queries of an episode share prompts


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """The prompts that are scored."""
    seen: list[Prompt] = []
    terms = MarkupModel.loss_terms

    def recording(self: MarkupModel, prompts: Sequence[Prompt], *args: Any) -> Any:
        seen.extend(prompts)
        return terms(self, prompts, *args)

    monkeypatch.setattr(MarkupModel, "loss_terms", recording)
    return seen


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scores as they are where each query has a prompt of its own."""

    def score(model: MarkupModel, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "MOST_QUERIES", 1)
            return model.scores(*args)

    return score


def many_queries(count: int) -> Episode:
    texts = ["is it cold outside", "when do you close", "my card was stolen, where is it", "hello"]
    return replace(EPISODE, queries=tuple(Query(f"{texts[i % 4]} {'ab'[i % 2] * (i % 3)}") for i in range(count)))


def assert_same(found: list[list[scoring.QueryScores]], wanted: list[list[scoring.QueryScores]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, other in zip((q for row in found for q in row), (q for row in wanted for q in row), strict=True):
        assert one.scores.shape == other.scores.shape
        assert torch.allclose(one.scores, other.scores, atol=1e-5)
        assert (one.shortened, one.dropped) == (other.shortened, other.dropped)


@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
@pytest.mark.parametrize("kind", MASKED)
def test_queries_share_prompts_and_score_the_same(
    kind: str, template: Any, answers: Any, composed: list[Prompt], singly: Any
) -> None:
    model = MarkupModel(backbone_of(kind), template, answers=answers)
    episodes = [many_queries(35), many_queries(1), replace(EPISODE, demos=()), replace(EPISODE, queries=())]
    found = model.scores(episodes, 1200)
    counts = sorted(len(prompt.slots) for prompt in composed)
    assert sum(counts) == 39
    assert max(counts) <= 16
    assert len(counts) < 39 / 2
    assert max(len(prompt.ids) for prompt in composed) <= 1200
    assert_same(found, singly(model, episodes, 1200))


def test_as_many_as_may_share_a_prompt_and_no_more(composed: list[Prompt]) -> None:
    model = MarkupModel(backbone_of("bert"), "markup")
    model.scores([many_queries(33)])
    assert sorted(len(prompt.slots) for prompt in composed) == [1, 16, 16]
    composed.clear()
    MarkupModel(backbone_of("bert", 0), "markup").scores([many_queries(5)])
    assert [len(prompt.slots) for prompt in composed] == [1] * 5


@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("kind", MASKED)
@settings(FAST, max_examples=6)
@given(queries=st.integers(1, 9), longer=st.integers(0, 60), share=st.floats(0, 1))
def test_demonstrations_give_way_as_they_do_for_a_single_query(
    kind: str, answers: Any, queries: int, longer: int, share: float
) -> None:
    episode = many_queries(queries)
    episode = replace(
        episode,
        demos=tuple(demo._replace(text=demo.text + " card" * longer) for demo in episode.demos),
        queries=(*episode.queries[:-1], Query("where is it? " * (1 + longer // 20))),
    )
    roomy = MarkupModel(backbone_of(kind), "markup", answers=answers)
    least = max(len(roomy.markup.compose(replace(single, demos=())).ids) for single in alone(episode)) + 12
    limit = least + int(share * (len(roomy.markup.compose(episode).ids) - least))
    backbone = copy(backbone_of(kind))
    backbone.max_length = limit
    model = MarkupModel(backbone, "markup", answers=answers)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Prompt] = []
        terms = MarkupModel.loss_terms
        patch.setattr(MarkupModel, "loss_terms", lambda *a: (seen.extend(a[1]), terms(*a))[1])
        [found] = model.scores([episode])
    assert sum(len(prompt.slots) for prompt in seen) == queries
    assert all(len(prompt.ids) <= limit for prompt in seen)
    assert all(len(p.slots) == 1 for p in seen if p.shortened or p.dropped)
    prompts = [model.markup.compose(single) for single in alone(episode)]
    assert [(one.shortened, one.dropped) for one in found] == [(p.shortened, p.dropped) for p in prompts]
    for one, single in zip(found, alone(episode), strict=True):
        if answers == "names":
            wanted = names_one_by_one(model, single)
        else:
            wanted = logits(model, [model.markup.compose(single)])[0]
        assert torch.allclose(one.scores, wanted, atol=1e-5)


def test_episodes_with_more_options_than_symbols_keep_their_places(singly: Any, composed: list[Prompt]) -> None:
    model = MarkupModel(backbone_of("bert"), "markup")
    lengths = ["d", "e", "f", "cold", "gg", "hh", "open", "x", "y", "zzz"]
    names = [f"{first} {second}" for first in "abc" for second in lengths]
    many = Episode(tuple(map(Option, names)), (), EPISODE.queries)
    episodes = [many, EPISODE, replace(many, queries=many.queries[:2]), many_queries(3)]
    found = model.scores(episodes, 10**6)
    assert [len(prompt.slots) for prompt in composed].count(3) == 3
    assert [[len(one.scores) for one in row] for row in found] == [[30] * 3, [3] * 3, [30] * 2, [3] * 3]
    assert_same(found, singly(model, episodes))


def test_a_batch_holds_no_more_tokens_than_it_may(composed: list[Prompt]) -> None:
    model = MarkupModel(backbone_of("bert"), "markup")
    lonely = max(len(model.markup.compose(single).ids) for single in alone(many_queries(20)))
    for tokens in (lonely + 30, 2 * lonely):
        composed.clear()
        model.scores([many_queries(20)], tokens)
        assert sum(len(prompt.slots) for prompt in composed) == 20
        assert all(len(prompt.ids) <= max(tokens, 1.25 * lonely) for prompt in composed if len(prompt.slots) > 1)
        assert max(len(prompt.slots) for prompt in composed) > 1


@pytest.mark.parametrize("answers", ["symbols", "names"])
def test_a_prompt_longer_than_a_batch_is_shared_where_that_adds_little(
    answers: Any, composed: list[Prompt], singly: Any
) -> None:
    model = MarkupModel(backbone_of("bert"), "markup", answers=answers)
    demos = tuple(demo._replace(text=demo.text + " card" * 20) for demo in EPISODE.demos)
    long = [replace(EPISODE, demos=demos, queries=tuple(Query(f"hello {'ab'[i % 2]}") for i in range(12)))]
    length = len(model.markup.compose(alone(long[0])[0]).ids)
    found = model.scores(long, 1)
    assert sum(len(prompt.slots) for prompt in composed) == 12
    assert 1 < max(len(prompt.slots) for prompt in composed) < 12
    assert max(len(prompt.ids) for prompt in composed) <= 1.25 * length
    assert_same(found, singly(model, long, 1))


def test_a_defect_is_reported_by_the_querys_place_in_its_episode() -> None:
    model = MarkupModel(backbone_of("bert"), "markup")
    queries = many_queries(30).queries
    with pytest.raises(PromptError, match="query 27 has an empty text"):
        model.scores([replace(EPISODE, queries=(*queries[:27], Query(" "), *queries[28:]))])
    small = MarkupModel(backbone_of("bert", max_length=60), "markup")
    with pytest.raises(PromptError, match="without any demonstration, but the limit is 60"):
        small.scores([replace(EPISODE, queries=(*queries[:3], Query("card " * 60), *queries[4:]))])


def test_predictions_are_those_of_each_text_alone() -> None:
    model = MarkupModel(backbone_of("roberta"), "markup")
    labels = [option.name for option in EPISODE.options]
    demos = [(demo.text, labels[demo.answer]) for demo in EPISODE.demos]
    texts = [query.text for query in many_queries(20).queries]
    for text, answer in zip(texts, model.classify(texts, labels, demos), strict=True):
        [own] = model.classify([text], labels, demos)
        assert (own.text, own.label) == (answer.text, answer.label)
        assert own.probabilities == pytest.approx(answer.probabilities, abs=1e-5)


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    yield
    assert all(hooks(backbone_of(kind).model) == 0 for kind in MASKED)
