"""Backbones: candidate logits are the model's own, tags are put in exactly, and nothing of the model changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.batching import Batch, cut_by_length
from icl_markup.errors import BackboneError
from icl_markup.model import MarkupModel
from icl_markup.prompt import Prompt
from icl_markup.tags import Tag, TagTable, initial_rows, substituted
from tests.conftest import byte_level_tokenizer, tiny_backbone, unigram_tokenizer
from tests.hub_stand_in import Repo, hub_for

LABELS = ["lost card", "opening hours", "weather"]
DEMOS = [("I lost my card", "lost card"), ("are you open on Sunday", "opening hours"), ("will it rain", "weather")]


def composed(model: MarkupModel, texts: list[str]) -> list[Prompt]:
    episode = model.episode(LABELS, DEMOS)
    from icl_markup.episodes import Episode, Query

    return [model.markup.compose(Episode(episode.options, episode.demos, (Query(text, 0),))) for text in texts]


def full_logits(backbone: Backbone, batch: Batch) -> torch.Tensor:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.zeros(len(batch.input_ids), 1, dtype=torch.long)
    return backbone.model(**inputs).logits[batch.rows, batch.positions].float().gather(1, batch.candidates)


def test_candidate_logits_are_those_of_the_whole_model(backbone: Backbone) -> None:
    model = MarkupModel(backbone, "plain_letters_input_category")
    batch = Batch.of_prompts(composed(model, ["when do you close", "is it cold outside today or not", "hello"]))
    with torch.no_grad():
        ours = backbone.candidate_logits(batch)
        assert torch.allclose(ours, full_logits(backbone, batch), atol=1e-5)


def test_a_prompt_gets_the_same_logits_alone_and_in_a_padded_batch(backbone: Backbone) -> None:
    model = MarkupModel(backbone, "markup_letters")
    prompts = composed(model, ["hi", "when do you close, and when do you open again on the day after that"])
    with torch.no_grad():
        together = backbone.candidate_logits(Batch.of_prompts(prompts, model.pad_id, all_slots=False), model.table)
        alone = [backbone.candidate_logits(Batch.of_prompts([p], all_slots=False), model.table) for p in prompts]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_tags_that_copy_vocabulary_rows_act_exactly_like_those_tokens(backbone: Backbone) -> None:
    ids = backbone.vocabulary[5:8]
    table = TagTable([Tag("<x>", 3)], backbone.embedding(ids).detach(), backbone.first_tag_id)
    text = backbone.encoder.encode(" are you open")
    head, tail = list(backbone.layout.prefix), list(backbone.layout.suffix)
    candidates = backbone.vocabulary[None, :20]

    def logits(middle: list[int]) -> torch.Tensor:
        line = [*head, *middle, *text, *tail]
        slot = (0, 0 if backbone.kind == "seq2seq" else len(line) - 1)
        return backbone.candidate_logits(Batch.of_ids([line], [slot], candidates), table)

    with torch.no_grad():
        assert torch.equal(logits(table.ids("<x>")), logits(ids.tolist()))


def test_substitution_is_undone_and_leaves_other_ids_bit_equal(backbone: Backbone) -> None:
    table = TagTable([Tag("<x>", 2)], torch.randn(2, backbone.width), backbone.first_tag_id)
    ids = backbone.vocabulary[None, :7]
    before = backbone.embedding(ids)
    with substituted(backbone.embedding, table):
        assert torch.equal(backbone.embedding(ids), before)
        mixed = torch.cat([ids, torch.tensor([table.ids("<x>")])], dim=1)
        out = backbone.embedding(mixed)
        assert torch.equal(out[:, :7], before)
        assert torch.equal(out[0, 7:], table.rows)
    assert torch.equal(backbone.embedding(ids), before)
    with pytest.raises((IndexError, RuntimeError)):
        backbone.embedding(torch.tensor([table.ids("<x>")]))


@pytest.mark.parametrize("method", ["description", "vocabulary", "normal"])
def test_initial_rows_have_the_scale_of_the_vocabulary(backbone: Backbone, method: str) -> None:
    tags = [Tag("<a>", 3, "opening hours"), Tag("<b>", 1, "")]
    args = (tags, backbone.embedding, backbone.vocabulary, backbone.encoder.encode)
    rows = initial_rows(*args, method=method, seed=3)
    table = backbone.embedding(backbone.vocabulary).float()
    assert rows.shape == (4, backbone.width)
    assert rows.dtype == torch.float32
    assert 0.05 * table.std() < rows.std() < 3 * table.std()
    assert torch.equal(rows, initial_rows(*args, method=method, seed=3))
    assert not torch.equal(rows, initial_rows(*args, method=method, seed=4))
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_a_tag_is_initialised_near_the_mean_of_its_description(backbone: Backbone) -> None:
    rows = initial_rows(
        [Tag("<a>", 64, "opening hours")], backbone.embedding, backbone.vocabulary, backbone.encoder.encode
    )
    centre = backbone.embedding(torch.tensor(backbone.encoder.encode(" opening hours"))).float().mean(0)
    deviation = backbone.embedding(backbone.vocabulary).float().std()
    assert (rows.mean(0) - centre).abs().max() < 0.1 * deviation


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    source = tiny_backbone(kind)
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        config = BackboneConfig(
            str(tmp_path), precision="none", device="cpu", max_length=200, gradient_checkpointing=checkpointing
        )
        model = MarkupModel(Backbone.load(config), "markup_letters")
        batch = Batch.of_prompts(composed(model, ["when do you close"]), model.pad_id)
        loss = torch.nn.functional.cross_entropy(model.backbone.candidate_logits(batch, model.table), batch.targets)
        loss.backward()
        gradients.append(model.table.rows.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_weights_keep_fp32_tags_with_finite_gradients(dtype: str, tmp_path: Path) -> None:
    source = tiny_backbone("llama")
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    backbone = Backbone.load(BackboneConfig(str(tmp_path), dtype=dtype, precision="none", device="cpu"))
    model = MarkupModel(backbone, "markup_letters")
    assert next(backbone.model.parameters()).dtype != torch.float32
    batch = Batch.of_prompts(composed(model, ["when do you close"]), model.pad_id)
    logits = backbone.candidate_logits(batch, model.table)
    torch.nn.functional.cross_entropy(logits, batch.targets).backward()
    assert logits.dtype == model.table.rows.grad.dtype == torch.float32
    assert torch.isfinite(model.table.rows.grad).all()


ARCHITECTURES = {
    "gpt2": lambda n: transformers.GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "qwen3": lambda n: transformers.Qwen3Config(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    ),
    "gemma2": lambda n: transformers.Gemma2Config(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0,
    ),
    "granite": lambda n: transformers.GraniteConfig(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=4.0, embedding_multiplier=3.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_architectures_that_scale_or_cap_their_logits_give_their_own(architecture: str) -> None:
    torch.manual_seed(1)
    tokenizer = byte_level_tokenizer(mask=False)
    network = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](len(tokenizer)))
    backbone = Backbone(network, tokenizer, "causal", max_length=120)
    model = MarkupModel(backbone, "plain_letters_bare")
    batch = Batch.of_prompts(composed(model, ["when do you close"]))
    with torch.no_grad():
        assert torch.allclose(backbone.candidate_logits(batch), full_logits(backbone, batch), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_t5_heads_give_their_own_logits_and_are_never_changed(tied: bool) -> None:
    torch.manual_seed(1)
    tokenizer = unigram_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )  # fmt: skip
    backbone = Backbone(transformers.T5ForConditionalGeneration(config), tokenizer, "seq2seq", max_length=200)
    checksum = backbone.checksum()
    model = MarkupModel(backbone, "plain_letters_input_category")
    batch = Batch.of_prompts(composed(model, ["when do you close"]))
    with torch.no_grad():
        assert torch.allclose(backbone.candidate_logits(batch), full_logits(backbone, batch), atol=1e-4)
    MarkupModel(backbone, "markup_letters").classify(["when"], LABELS)
    assert backbone.checksum() == checksum


@pytest.mark.parametrize("keep", [0, 5, 2000, 10_000])
def test_weights_that_are_not_whole_are_named(keep: int, tmp_path: Path) -> None:
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path, max_shard_size="20kB")
    source.tokenizer.save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, keep)
    told = f"^{shard}: damaged, or not whole: it cannot be read as weights .*; copy or download the model again$"
    with pytest.raises(BackboneError, match=told):
        Backbone.load(BackboneConfig(str(tmp_path), device="cpu"))


def test_weights_that_are_not_whole_in_the_hubs_cache_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 2000)
    with hub_for(monkeypatch, tmp_path / "hub") as hub:
        hub.repos["user/tiny"] = Repo()
        hub.repos["user/tiny"].commit({file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()})
        with pytest.raises(BackboneError, match=r"damaged, or not whole: .*; delete .*, and the") as told:
            Backbone.load(BackboneConfig("user/tiny", device="cpu"))
    folder = Path(str(told.value).rpartition("; delete ")[2].partition(", and the")[0])
    assert folder.name == "models--user--tiny" and folder.is_dir()


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    source = tiny_backbone("bert")
    source.model.bert.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="set kind to"):
        Backbone.load(BackboneConfig(str(tmp_path), device="cpu"))
    with pytest.raises(BackboneError, match="lacks weights"):
        Backbone.load(BackboneConfig(str(tmp_path), kind="masked", device="cpu"))


def test_a_missing_model_and_an_unknown_device_are_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="nowhere"):
        Backbone.load(str(tmp_path / "nowhere"))
    with pytest.raises(BackboneError, match="device 'abacus'"):
        Backbone.load(BackboneConfig(device="abacus"))


def test_the_checksum_sees_a_single_bit(bert: Backbone) -> None:
    before = bert.checksum()
    with torch.no_grad():
        bert.model.bert.encoder.layer[1].output.dense.bias[3] += 1e-30
    assert bert.checksum() != before


def test_batches_stay_within_the_token_budget_and_hold_every_item_once() -> None:
    lengths = [7, 3, 50, 3, 12, 12, 31, 1]
    batches = cut_by_length(lengths, 40)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 40 for b in batches)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_a_cpu_computes_in_bf16_by_default_only_where_that_is_faster(
    has_tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_backbone("llama")
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles, raising=False)
    assert Backbone.load(BackboneConfig(str(tmp_path), device="cpu")).precision == ("bf16" if has_tiles else "none")
