"""Shared prefixes: answers over a cache are those to whole prompts, and what was computed is not computed again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from icl_markup import sharing
from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.branches import common
from icl_markup.episodes import Episode, Query
from icl_markup.exactness import Exactness
from icl_markup.loading import checkpoint_gradients
from icl_markup.model import MarkupModel
from icl_markup.packing import Prefix, Tree, grow
from icl_markup.prefixes import MOST_ENTRIES, PrefixCache
from icl_markup.sharing import FEW, LEAST_SHARED, find_groups, prefix_length
from tests.conftest import byte_level_tokenizer, tiny_backbone

LABELS = ["lost card", "opening hours", "weather", "complaint"]
WORDS = ["card", "bank", "open", "close", "rain", "cold", "lost", "stolen", "time", "day", "when", "where", "is", "my"]
DEMOS = [("I lost my card", "lost card"), ("are you open on Sunday", "opening hours"), ("will it rain", "weather")]
TEXTS = ["hi", "when do you close and open again on the day after that, if it does not rain", "is it cold", "my card"]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 2}
NETWORKS = {
    "gpt2": lambda n: transformers.GPT2Config(vocab_size=n, **GPT2),
    "qwen3": lambda n: transformers.Qwen3Config(vocab_size=n, **SIZES, head_dim=8, tie_word_embeddings=True),
    "mistral": lambda n, window=4096: transformers.MistralConfig(vocab_size=n, **SIZES, sliding_window=window),
    "gemma2": lambda n, window=4096: transformers.Gemma2Config(
        vocab_size=n, **SIZES, head_dim=8, sliding_window=window
    ),
    "gpt_neo": lambda n, window=256: transformers.GPTNeoConfig(
        vocab_size=n, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=window, max_position_embeddings=256, bos_token_id=0, eos_token_id=2,
    ),
    "dynamic": lambda n: transformers.LlamaConfig(
        vocab_size=n, **SIZES | {"max_position_embeddings": 90}, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
    "bloom": lambda n: transformers.BloomConfig(vocab_size=n, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda n: transformers.MptConfig(vocab_size=n, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "lfm2": lambda n: transformers.Lfm2Config(vocab_size=n, **SIZES, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def causal(name: str, **options: object) -> Backbone:
    """A tiny causal backbone; the same name always gives the same weights."""
    if name == "llama":
        return tiny_backbone("llama")
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(mask=False)
    network = transformers.AutoModelForCausalLM.from_config(NETWORKS[name](len(tokenizer), **options))
    with torch.no_grad():  # random weights are so small that attention hardly tells tokens apart
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return Backbone(network, tokenizer, "causal", max_length=250)


def asked(texts: Sequence[str] = TEXTS, demos: Sequence[tuple[str, str]] = DEMOS) -> Episode:
    return replace(MarkupModel.episode(LABELS, demos), queries=tuple(map(Query, texts)))


def drawn(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def flat(model: MarkupModel, episodes: Sequence[Episode], batch_tokens: int = 2048) -> torch.Tensor:
    """Scores of all queries, below each other."""
    return torch.stack([one.scores for found in model.scores(episodes, batch_tokens) for one in found])


def whole(model: MarkupModel, episodes: Sequence[Episode]) -> torch.Tensor:
    """The same from whole prompts."""
    backbone = model.backbone
    found, backbone.exactness = backbone.exactness, Exactness(0)
    try:
        return flat(model, episodes)
    finally:
        backbone.exactness = found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_scores_over_the_cache_are_those_of_whole_prompts(name: str, answers: str, attention: str) -> None:
    backbone = causal(name)
    backbone.model.set_attn_implementation(attention)
    model = MarkupModel(backbone, "markup_letters", answers=answers)
    rng = random.Random(3)
    many = asked([drawn(rng, 30) for _ in range(20)], [(drawn(rng, 6), rng.choice(LABELS)) for _ in range(8)])
    episodes = [many, asked(), asked(["only one"])]
    wanted = whole(model, episodes)
    assert model.prefixes.counts.reused == 0
    first, second = flat(model, episodes), flat(model, episodes)
    assert model.prefixes.counts.reused > 20 * 60
    assert torch.allclose(first, wanted, atol=1e-5)
    assert torch.allclose(second, wanted, atol=1e-5)
    assert wanted.std(0).min() > 1e-3


@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_the_size_of_batches_changes_no_score(answers: str, tokens: int) -> None:
    model = MarkupModel(causal("gpt2"), "markup_letters", answers=answers)
    episodes = [asked(), asked(TEXTS[::-1], DEMOS[:1])]
    assert torch.allclose(flat(model, episodes, tokens), whole(model, episodes), atol=1e-5)
    assert model.prefixes.counts.reused > 0


@pytest.mark.parametrize("answers", ["symbols", "names"])
def test_context_queries_and_names_are_one_pass(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trees: list[Sequence[Tree]] = []

    def counting(backbone: Backbone, table: object, pack: Sequence[Tree]) -> object:
        trees.append(pack)
        return grow(backbone, table, pack)

    model = MarkupModel(causal("llama"), "markup_letters", answers=answers)
    assert model.backbone.exactness.limit  # is found out with passes of its own
    monkeypatch.setattr(sharing, "grow", counting)
    flat(model, [asked(TEXTS[:2])])
    [[tree]] = trees
    assert len(tree.trunk) > LEAST_SHARED
    assert len(tree.branches) == 2 * (1 if answers == "symbols" else 1 + len(LABELS))


def test_no_sequence_holds_more_new_tokens_than_a_batch_may(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(backbone: Backbone, table: object, trees: Sequence[Tree]) -> object:
        sizes.append(sum(len(branch) for tree in trees for branch in tree.branches))
        return grow(backbone, table, trees)

    monkeypatch.setattr(sharing, "grow", counting)
    model = MarkupModel(causal("llama"), "markup_letters")
    rng = random.Random(1)
    model.scores([asked([drawn(rng, 10) for _ in range(40)])], 100)
    assert max(sizes) <= 100
    assert len(sizes) > 4
    model.scores([asked([drawn(rng, 10) for _ in range(100)])], 10**6)
    assert max(sizes) <= sharing.MOST_PACKED


def test_demonstrations_that_were_shortened_for_one_query_are_not_shared_with_others() -> None:
    model = MarkupModel(causal("gpt2"), "markup_letters")
    rng = random.Random(5)
    demos = [(" ".join(rng.choice(WORDS) for _ in range(9 + 5 * i)), rng.choice(LABELS)) for i in range(6)]
    episode = asked([drawn(rng, 20) for _ in range(12)], demos)
    found, wanted = model.scores([episode])[0], whole(model, [episode])
    assert len({one.shortened for one in found}) > 2
    assert torch.allclose(torch.stack([one.scores for one in found]), wanted, atol=1e-5)


@pytest.mark.parametrize("answers", ["symbols", "names"])
def test_a_second_call_computes_no_prefix_token_again(answers: str) -> None:
    model = MarkupModel(causal("llama"), "markup_letters", answers=answers)
    counts = model.prefixes.counts
    model.classify(["hi"], LABELS, DEMOS, calibration="none")
    length = prefix_length(model.markup.compose(asked(["hi"])))
    assert (counts.hits, counts.misses, counts.computed, counts.reused) == (0, 1, length, 0)
    model.classify(TEXTS, LABELS, DEMOS, calibration="none")
    assert (counts.hits, counts.misses, counts.computed, counts.reused) == (1, 1, length, 4 * length)
    model.classify(TEXTS, LABELS, [*DEMOS, ("my card", "lost card")], calibration="none")
    assert counts.misses == 2
    assert length < counts.computed < length + 20


@pytest.mark.parametrize("answers", ["symbols", "names"])
def test_a_changed_tag_row_or_weight_is_noticed(answers: str) -> None:
    model = MarkupModel(causal("llama"), "markup_letters", answers=answers)
    before = flat(model, [asked()])
    for parameter in (model.table.rows, model.backbone.model.model.layers[0].self_attn.v_proj.weight):
        with torch.no_grad():
            parameter[1] += 1.0
        changed = flat(model, [asked()])
        assert torch.allclose(changed, whole(model, [asked()]), atol=1e-5)
        assert not torch.allclose(changed, before, atol=1e-4)
        with torch.no_grad():
            parameter[1] -= 1.0
        assert torch.allclose(flat(model, [asked()]), before, atol=1e-5)


def test_bytes_are_bounded_and_the_longest_unused_go_first() -> None:
    model = MarkupModel(causal("llama"), "plain_letters_text_label")
    episodes = [asked(TEXTS, [(word, "weather")] * 3) for word in ("rain", "cold", "time")]
    model.scores(episodes[:1])
    size = model.prefixes.bytes
    prefix = model.markup.compose(asked(["hi"], [("rain", "weather")] * 3))
    assert size == prefix_length(prefix) * 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, fp32
    model.prefixes = PrefixCache(int(2.5 * size))
    for episode in (episodes[0], episodes[1], episodes[0], episodes[2]):
        model.scores([episode])
        assert model.prefixes.bytes <= 2.5 * size
    assert len(model.prefixes) == 2
    misses = model.prefixes.counts.misses
    model.scores([episodes[0]])
    assert model.prefixes.counts.misses == misses == 3
    model.scores([episodes[1]])
    assert model.prefixes.counts.misses == 4


def test_a_cache_without_room_keeps_nothing_and_gives_the_same_scores() -> None:
    model = MarkupModel(causal("llama"), "markup_letters")
    wanted = flat(model, [asked()])
    model.prefixes = PrefixCache(0)
    assert torch.equal(flat(model, [asked()]), wanted)
    assert len(model.prefixes) == model.prefixes.bytes == 0


def test_the_number_of_prefixes_is_bounded_and_clearing_empties() -> None:
    cache = PrefixCache()
    tensor = torch.zeros(1, 1, 2, 1)
    for i in range(MOST_ENTRIES + 5):
        cache.keep(Prefix((7, i), ((tensor, tensor),)))
    assert len(cache) == MOST_ENTRIES
    assert cache.bytes == MOST_ENTRIES * 16
    assert (7, 4) not in cache
    assert (7, 5) in cache
    part = cache.longest((7, 3, 9))
    assert part is not None
    assert part.ids == (7,)
    assert part.layers[0][0].shape == (1, 1, 1, 1)
    assert cache.longest((8, 3)) is None
    cache.clear()
    assert len(cache) == cache.bytes == 0


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_neo"])
def test_a_window_that_prompts_are_longer_than_gets_whole_prompts(name: str) -> None:
    windowed, wide = (MarkupModel(causal(name, window=w), "markup_letters") for w in (40, 200))
    episode = asked([*TEXTS, *["is it open on the day after that"] * 12])
    assert torch.equal(flat(windowed, [episode]), whole(windowed, [episode]))
    assert windowed.backbone.exactness == Exactness(40)
    assert windowed.prefixes.counts.computed == 0
    assert torch.allclose(flat(wide, [episode]), whole(wide, [episode]), atol=1e-5)
    assert wide.prefixes.counts.reused > 0
    assert not torch.allclose(flat(wide, [episode]), flat(windowed, [episode]), atol=1e-4)


def test_angles_that_depend_on_the_length_of_a_prompt_are_not_shared() -> None:
    model = MarkupModel(causal("dynamic"), "markup_letters")
    episodes = [asked([text]) for text in ("hi", "hi there", "when do you close " * 6)]
    wanted = torch.cat([whole(model, [episode]) for episode in episodes])  # in one batch, angles are the longest's
    assert model.backbone.exactness == Exactness(89)
    found = model.scores([replace(episodes[0], queries=tuple(e.queries[0] for e in episodes))])[0]
    assert torch.allclose(torch.stack([one.scores for one in found]), wanted, atol=1e-5)
    assert model.prefixes.counts.reused > 0
    model.backbone.exactness = Exactness(250)
    flat(model, episodes[:1])
    assert not torch.allclose(flat(model, episodes[2:]), wanted[2:], atol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "mpt", "lfm2"])
def test_models_that_cannot_be_packed_get_whole_prompts(name: str) -> None:
    model = MarkupModel(causal(name), "markup_letters")
    assert model.backbone.exactness.limit == 0
    assert model.backbone.exactness.obstacle
    assert torch.equal(flat(model, [asked()]), whole(model, [asked()]))
    assert len(model.prefixes) == 0


def test_an_attention_that_may_take_no_mask_gets_whole_prompts() -> None:
    model = MarkupModel(causal("llama"), "markup_letters")
    wanted, calls = whole(model, [asked()]), model.prefixes.counts
    model.scores([asked()])
    reused = calls.reused
    transformers.AttentionInterface.register("maskless", transformers.AttentionInterface()["sdpa"])
    transformers.AttentionMaskInterface.register("maskless", transformers.AttentionMaskInterface()["sdpa"])
    model.backbone.model.set_attn_implementation("maskless")
    assert torch.allclose(flat(model, [asked()]), wanted, atol=1e-5)
    assert calls.reused == reused > 0
    fresh = Backbone(model.backbone.model, model.backbone.tokenizer, "causal")
    assert fresh.exactness.limit == 0
    assert "maskless" in fresh.exactness.obstacle


def test_other_kinds_share_nothing(backbone: Backbone) -> None:
    model = MarkupModel(backbone, "markup_letters")
    model.classify(TEXTS, LABELS, DEMOS, calibration="none")
    assert (len(model.prefixes) > 0) == (backbone.exactness.limit > 0) == (backbone.kind == "causal")


def test_the_model_is_bit_identical_afterwards() -> None:
    backbone = causal("qwen3")
    before = backbone.checksum()
    for answers in ("symbols", "names"):
        MarkupModel(backbone, "markup_letters", answers=answers).classify(TEXTS, LABELS, DEMOS)
    assert backbone.checksum() == before


@pytest.mark.parametrize("changed", [0, 1, 3])
@pytest.mark.parametrize("answers", ["symbols", "names"])
def test_nothing_leaks_from_one_packed_query_to_another(answers: str, changed: int) -> None:
    model = MarkupModel(causal("gpt2"), "markup_letters", answers=answers)
    texts = [*TEXTS[:changed], "something else altogether, much longer than before", *TEXTS[changed + 1 :]]
    difference = (flat(model, [asked()]) - flat(model, [asked(texts)])).abs().amax(1)
    others = [i for i in range(len(TEXTS)) if i != changed]
    assert difference[others].max() < 2e-6
    assert difference[changed] > 1e-3


def test_prompts_with_demonstrations_of_their_own_share_their_head() -> None:
    model = MarkupModel(causal("llama"), "markup_letters")
    rng = random.Random(2)
    episodes = [
        asked([drawn(rng, 8)], [(f"{word} {drawn(rng, 8)}", rng.choice(LABELS)) for _ in range(3)]) for word in WORDS
    ]
    assert torch.allclose(flat(model, episodes), whole(model, episodes), atol=1e-5)
    first = model.markup.compose(asked(["x"], []))
    counts = model.prefixes.counts
    assert prefix_length(first) <= counts.computed < prefix_length(first) + 8
    assert counts.reused == counts.computed * (len(episodes) - 1)
    computed = counts.computed
    flat(model, episodes[:1])
    assert counts.reused > computed * (len(episodes) - 1)


def test_recomputed_activations_do_not_stand_in_the_way() -> None:
    backbone = causal("gpt2")
    wanted = flat(MarkupModel(backbone, "markup_letters"), [asked()])
    checkpoint_gradients(backbone.model)
    backbone = Backbone(backbone.model, backbone.tokenizer, "causal", max_length=250)
    backbone.model.train()
    model = MarkupModel(backbone, "markup_letters")
    assert torch.allclose(flat(model, [asked()]), wanted, atol=1e-5)
    assert model.prefixes.counts.reused > 0
    assert all(module.training for module in backbone.model.modules())


def test_training_has_its_gradients_and_leaves_the_cache_alone() -> None:
    model = MarkupModel(causal("llama"), "markup_letters")
    model.scores([asked()])
    computed = model.prefixes.counts.computed
    episode = asked(["hi"])
    model.loss_terms([model.markup.compose(episode)], [episode], True).scores.sum().backward()
    assert model.table.rows.grad.abs().sum() > 0
    assert model.prefixes.counts.computed == computed


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_trees_in_one_sequence_give_the_states_of_whole_prompts_and_keep_their_tensors(name: str) -> None:
    backbone = causal(name)
    ids = backbone.vocabulary.tolist()
    heads, rests = [tuple(ids[:30]), tuple(ids[60:71])], [tuple(ids[100:104]), (), tuple(ids[40:45])]
    tails = (tuple(ids[10:12]), tuple(ids[30:50]), tuple(ids[5:6]))
    pasts = [grow(backbone, None, [Tree(None, head, ())])[0].prefix() for head in heads]
    copies = [[x.clone() for layer in past.layers for x in layer] for past in pasts]
    trees = [Tree(pasts[0], rests[0], tails), Tree(pasts[1], rests[1], tails[:2]), Tree(None, rests[2], tails[1:])]
    grown = grow(backbone, None, [*trees, Tree(pasts[0], (), tails[:1])])
    begun = [heads[0] + rests[0], heads[1], rests[2], heads[0]]
    for start, tree in zip(begun, grown, strict=True):
        for tail, found in zip(tree.tree.branches, tree.branches, strict=True):
            line = start + tail
            batch = Batch.of_ids([line], [(0, i) for i in range(len(start), len(line))], torch.zeros(len(tail), 1))
            assert torch.allclose(found, backbone._hidden(batch, None), atol=1e-5)
        kept = tree.prefix()
        alone = grow(backbone, None, [Tree(None, start, ())])[0].prefix()
        assert kept.ids == start
        for one, other in zip(kept.layers, alone.layers, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    for past, copy in zip(pasts, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((x for layer in past.layers for x in layer), copy, strict=True))


LINES = st.lists(st.integers(0, 2), max_size=40).map(tuple)


@given(LINES, LINES)
def test_what_two_sequences_have_in_common(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    length = common(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), LINES), max_size=24))
def test_groups_share_their_heads_and_hold_each_prompt_once_at_most(kinds: list[tuple[int, int, tuple]]) -> None:
    prefixes = [(7,) * 20 * a + (8,) * 20 * b + line for a, b, line in kinds]
    groups = find_groups(prefixes)
    members = [i for group in groups for i in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert all(prefixes[i][: len(group.head)] == group.head for i in group.members)
    single = [i for i, prefix in enumerate(prefixes) if prefixes.count(prefix) == 1]
    assert set(range(len(prefixes))) - set(single) <= set(members)
    if len(single) <= FEW:
        assert sorted(members) == list(range(len(prefixes)))


def test_many_single_prompts_are_grouped_by_task_and_strangers_are_left_out() -> None:
    tasks = [(number,) * (LEAST_SHARED + 4) for number in (1, 2)]
    prefixes = [(*task, 9, i, i) for i in range(5) for task in tasks] + [(3, 4, 5), (4,) * 50]
    groups = find_groups(prefixes)
    assert {(group.head, group.members) for group in groups} == {
        ((*tasks[0], 9), (0, 2, 4, 6, 8)),
        ((*tasks[1], 9), (1, 3, 5, 7, 9)),
    }
