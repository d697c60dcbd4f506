"""Names are scored in one pass over their context: the scores and gradients are those of prompts of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from icl_markup.backbone import Backbone
from icl_markup.branches import BranchedSequence, branched_prompts
from icl_markup.episodes import Episode, EpisodeConfig, EpisodeSampler
from icl_markup.exactness import Exactness
from icl_markup.model import MarkupModel, SlotScores
from icl_markup.normalizer import log_normalizer
from icl_markup.prompt import Prompt
from tests.conftest import byte_level_tokenizer, tiny_backbone, tiny_task, unigram_tokenizer

SHARING = ("llama", "gemma3", "gpt2", "t5", "bart")


def backbone_of(name: str, **options: object) -> Backbone:
    """A tiny backbone whose names can share a pass."""
    if name in ("llama", "t5"):
        return tiny_backbone(name, **options)
    torch.manual_seed(0)
    tokenizer = unigram_tokenizer() if name == "bart" else byte_level_tokenizer(mask=False)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": 2}
    if name == "gemma3":
        config = transformers.Gemma3TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, sliding_window=200, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            max_position_embeddings=256, **size,
        )  # fmt: skip
        return Backbone(transformers.Gemma3ForCausalLM(config), tokenizer, "causal", name="tiny-gemma3", **options)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **size)
        return Backbone(transformers.GPT2LMHeadModel(config), tokenizer, "causal", name="tiny-gpt2", **options)
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256, dropout=0.0, decoder_start_token_id=1,
        **size,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    return Backbone(model, tokenizer, "seq2seq", name="tiny-bart", max_length=250, **options)


def episodes(count: int = 3) -> list[Episode]:
    """Episodes of three or four options with names of several lengths, and two queries each."""
    config = EpisodeConfig(n_way=(3, 4), k_shot=(0, 1), queries=(2, 2), none_option=0.3)
    sampler = EpisodeSampler([tiny_task()], config, seed=1)
    return [sampler.episode(0, position) for position in range(count)]


def composed(model: MarkupModel, drawn: list[Episode]) -> tuple[list[Prompt], list[Episode]]:
    """The prompts of some episodes, and the episode of each."""
    pairs = [(prompt, episode) for episode in drawn for prompt in model.markup.compose_each(episode)]
    return [prompt for prompt, _ in pairs], [episode for _, episode in pairs]


def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name have a copy of its prompt."""
    monkeypatch.setattr(Backbone, "shares_names", property(lambda _self: False))


def trained(model: MarkupModel, drawn: list[Episode]) -> tuple[SlotScores, torch.Tensor]:
    """Scores, and the gradient of the loss with regard to the tags."""
    assert model.table is not None
    model.table.rows.grad = None
    terms = model.loss_terms(*composed(model, drawn), True)
    terms.loss(0.2).backward()
    assert model.table.rows.grad is not None
    return terms, model.table.rows.grad.clone()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SHARING)
def test_one_pass_has_the_scores_and_gradients_of_separate_prompts(
    kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of(kind)
    backbone.model.set_attn_implementation(attention)
    model = MarkupModel(backbone, "markup_words", length_normalised=False)
    assert model.answers == "names" and backbone.shares_names
    one, gradient = trained(model, episodes())
    with monkeypatch.context() as patch:
        without_sharing(patch)
        copies, wanted = trained(model, episodes())
    assert torch.equal(one.scores.isfinite(), copies.scores.isfinite())
    assert torch.allclose(one.scores, copies.scores, atol=1e-4)
    assert torch.allclose(one.right, copies.right, atol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(gradient, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert float(wanted.abs().max()) > 0


@pytest.mark.parametrize("kind", SHARING)
def test_answers_have_the_scores_that_training_has(kind: str) -> None:
    model = MarkupModel(backbone_of(kind), "markup_words", length_normalised=False)
    drawn = episodes()
    with torch.no_grad():
        wanted = model.loss_terms(*composed(model, drawn), True).scores
    found = [one.scores for episode in model.scores(drawn) for one in episode]
    for row, scores in zip(wanted, found, strict=True):
        assert torch.allclose(row[: len(scores)], scores, atol=1e-4)


def test_a_context_is_computed_once_for_all_queries_and_names() -> None:
    model = MarkupModel(tiny_backbone("llama"), "markup_words")
    [episode] = episodes(1)
    prompts = model.markup.compose_each(episode)
    context = max(i for i in range(len(prompts[0].ids)) if prompts[0].ids[:i] == prompts[1].ids[:i])
    stems = sum(len(prompt.ids) - context for prompt in prompts)
    names = sum(len(model.markup.name_ids(option.name)) - 1 for option in episode.options)
    assert model.tokens_of(prompts, episode) == context + stems + len(prompts) * names


def test_prompts_beyond_a_models_window_are_scored_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MarkupModel(tiny_backbone("llama"), "markup_words", length_normalised=False)
    wanted, _ = trained(model, episodes())
    prompts, _ = composed(model, episodes())
    limit = max(len(prompt.ids) for prompt in prompts) // 2
    monkeypatch.setattr(model.backbone, "exactness", Exactness(limit))
    found, _ = trained(model, episodes())
    assert torch.allclose(found.scores, wanted.scores, atol=1e-4)


def test_long_prompts_are_copied_as_a_mask_of_theirs_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MarkupModel(tiny_backbone("llama"), "markup_words")
    wanted, gradient = trained(model, episodes())
    prompts, of = composed(model, episodes())
    monkeypatch.setattr("icl_markup.names.LONGEST_BRANCH", min(len(prompt.ids) for prompt in prompts))
    assert model.tokens_of(prompts[:1], of[0]) == len(prompts[0].ids) * len(of[0].options)
    found, again = trained(model, episodes())
    assert torch.allclose(found.scores, wanted.scores, atol=1e-4)
    assert torch.allclose(again, gradient, atol=1e-4 * float(gradient.abs().max()))


def test_branches_see_their_own_prompt_and_nothing_else() -> None:
    sequence = BranchedSequence()
    trunk = sequence.add([1, 2])
    first = sequence.add([3], trunk)
    sequence.add([4, 5], first)
    second = sequence.add([6], trunk)
    sequence.add([], second)
    assert sequence.positions == [0, 1, 2, 3, 4, 2]
    assert sequence.depth == 5
    seen = sequence.visible(8)
    assert seen[4].tolist() == [True, True, True, True, True, False, False, False]
    assert seen[5].tolist() == [True, True, False, False, False, True, False, False]
    assert seen[7].tolist() == [False] * 7 + [True]  # padding sees itself, lest its softmax is of nothing


def test_a_prompt_that_is_the_beginning_of_another_keeps_its_last_id() -> None:
    model = MarkupModel(tiny_backbone("llama"), "markup_words")
    [episode] = episodes(1)
    prompt = model.markup.compose(replace(episode, queries=episode.queries[:1]))
    written = branched_prompts([prompt, prompt], [((7, 8),), ((9,),)])
    assert written.reads[0][0][0] != written.reads[1][0][0]
    assert len(written.sequence.ids) == len(prompt.ids) + 2


def test_the_normalizer_has_the_gradient_of_the_whole_softmax() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 8), torch.randn(5, 8, requires_grad=True)
    wanted = (hidden @ weight.T).logsumexp(-1)
    (gradient,) = torch.autograd.grad((wanted * torch.arange(5)).sum(), hidden)
    found = log_normalizer(hidden, lambda rows: rows @ weight.T, 2**23)  # two states at a time
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(torch.autograd.grad((found * torch.arange(5)).sum(), hidden)[0], gradient, atol=1e-5)


def test_the_right_names_own_loss_is_a_share_of_the_loss() -> None:
    scores = SlotScores(
        torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1, -1]), torch.tensor([True, True]),
        torch.tensor([-3.0, -5.0]),
    )  # fmt: skip
    contrast = scores.loss(0.0)
    assert contrast == pytest.approx(-torch.tensor([0.0, 1.0]).log_softmax(-1)[1])
    assert scores.loss(0.5) == pytest.approx(float(contrast) + 0.5 * 3.0)
