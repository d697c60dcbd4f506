"""Merged checkpoints: the same logits, tags that cannot be generated, refused and not left behind where they differ."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import icl_markup.export_merged
from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.episodes import Episode, Query
from icl_markup.errors import ExportError, PromptError
from icl_markup.export_merged import export_merged
from icl_markup.exported import Exported
from icl_markup.merging import with_rows
from icl_markup.model import MarkupModel
from icl_markup.template import Template
from tests.conftest import shared_path, tiny_backbone, wordpiece_tokenizer

EPISODE = MarkupModel.episode(["lost card", "weather"], [("my card is gone", "lost card"), ("is it cold", "weather")])
QUERIES = ["where is my card", "will it rain"]


def tied_llama(rows: int = 420) -> Backbone:
    torch.manual_seed(0)
    source = tiny_backbone("llama")
    config = copy.deepcopy(source.model.config)
    config.tie_word_embeddings, config.vocab_size, config.initializer_range = True, rows, 0.3
    return Backbone(transformers.LlamaForCausalLM(config), source.tokenizer, "causal", name="tied-llama")


def untied_t5(scaled: bool = False) -> Backbone:
    source = tiny_backbone("t5")
    model = source.model
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(150, 32) * 0.1)
    model.all_tied_weights_keys.pop("lm_head.weight")
    model.config.scale_decoder_outputs = scaled
    return Backbone(model, source.tokenizer, "seq2seq", name="untied-t5", max_length=256)


def biased_bert(tied: bool = True) -> Backbone:
    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer()
    config = copy.deepcopy(tiny_backbone("bert").model.config)
    config.tie_word_embeddings = tied
    model = transformers.BertForMaskedLM(config)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return Backbone(model, tokenizer, "masked", name="biased-bert")


def half_llama() -> Backbone:
    source = tied_llama()
    return Backbone(source.model.to(torch.bfloat16), source.tokenizer, "causal", name="half-llama")


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "untied llama, resized": lambda: tiny_backbone("llama"),
    "tied llama, resized": tied_llama,
    "tied llama, spare rows": lambda: tied_llama(440),
    "tied llama, some spare rows": lambda: tied_llama(424),
    "bf16 llama": half_llama,
    "tied t5, spare rows": lambda: tiny_backbone("t5"),
    "untied t5": untied_t5,
    "untied t5 that scales": lambda: untied_t5(True),
    "tied bert with a bias": biased_bert,
    "untied bert with a bias": lambda: biased_bert(False),
    "roberta": lambda: tiny_backbone("roberta"),
}


def warmed(backbone: Backbone, template: str | Template = "markup_letters") -> MarkupModel:
    """A model whose tags are far from where they began, so that a tag in the head would often win."""
    model = MarkupModel(backbone, template, seed=3)
    with torch.no_grad():
        model.table.rows.add_(torch.randn(model.table.rows.shape, generator=torch.Generator().manual_seed(4)))
    return model


@pytest.mark.parametrize("which", BACKBONES)
def test_a_merged_checkpoint_gives_the_same_answers_and_never_a_tag(which: str, tmp_path: Path) -> None:
    backbone = BACKBONES[which]()
    model = warmed(backbone)
    before = backbone.checksum()
    merged = export_merged(model, tmp_path / "merged")
    assert backbone.checksum() == before
    exact = backbone.model.dtype == torch.float32
    assert merged.agreement.largest_difference <= (1e-5 if exact else 0.03)
    assert (merged.resized is None) == ("t5" in which or which == "tied llama, spare rows")

    loaded = Backbone.load(
        BackboneConfig(str(merged.folder), kind=backbone.kind, device="cpu", precision="none", attention="eager")
        if exact
        else BackboneConfig(str(merged.folder), device="cpu", precision="none", dtype="bf16")
    )
    assert loaded.model.dtype == backbone.model.dtype
    exported = Exported.load(merged.folder)
    tags = merged.placement.all_ids
    for prompt, live in zip(exported.prompts(EPISODE, QUERIES), model.scores([_asked()])[0], strict=True):
        logits = _answer_logits(loaded, prompt.ids, prompt.slots[-1].position)
        found = logits[list(prompt.slots[-1].candidates)]
        torch.testing.assert_close(found, live.scores, atol=1e-4 if exact else 0.1, rtol=1e-4 if exact else 0.05)
        assert logits[tags].softmax(-1).isfinite().all()
        assert logits.softmax(-1)[tags].max() <= 1 / len(logits) * 1.05
        assert int(logits.argmax()) not in tags
    if backbone.kind != "masked":
        ids = torch.tensor([exported.prompts(EPISODE, QUERIES)[0].ids])
        sampled = loaded.model.generate(ids, do_sample=True, max_new_tokens=40, num_return_sequences=8, temperature=5.0)
        new = sampled if backbone.kind == "seq2seq" else sampled[:, ids.shape[1] :]
        assert not set(new.flatten().tolist()) & set(tags)


def _asked() -> Episode:
    return replace(EPISODE, queries=tuple(map(Query, QUERIES)))


def _answer_logits(backbone: Backbone, ids: tuple[int, ...], position: int) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([ids])}
    if backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[backbone.model.config.decoder_start_token_id]])
    with torch.inference_mode():
        return backbone.model(**inputs).logits[0, position].float()


def test_without_the_protection_of_the_head_a_tag_would_be_generated(tmp_path: Path) -> None:
    model = warmed(tied_llama())
    merged = export_merged(model, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged.folder)
    ids = torch.arange(10, 200)[None]
    assert not set(plain(ids).logits.argmax(-1).flatten().tolist()) & set(merged.placement.all_ids)
    plain.lm_head.weight = plain.model.embed_tokens.weight
    assert set(plain(ids).logits.argmax(-1).flatten().tolist()) & set(merged.placement.all_ids)


def test_a_folder_that_would_answer_otherwise_is_refused_and_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(backbone: Backbone, ids: list[int], rows: torch.Tensor) -> transformers.PreTrainedModel:
        return with_rows(backbone, ids, rows.flip(0))

    model = warmed(tiny_backbone("llama"))
    earlier = export_merged(model, tmp_path / "merged").folder
    kept = {path.name: path.read_bytes() for path in earlier.iterdir()}
    monkeypatch.setattr(icl_markup.export_merged, "with_rows", wrong)
    for folder in (tmp_path / "new", earlier):
        with pytest.raises(ExportError, match="answers otherwise"):
            export_merged(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == kept


def test_a_head_that_could_answer_with_a_tag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unprotected(backbone: Backbone, ids: list[int], rows: torch.Tensor) -> transformers.PreTrainedModel:
        merged = with_rows(backbone, ids, rows)
        head = merged.get_output_embeddings().weight
        head[ids] = head[: len(ids)] * 3
        return merged

    monkeypatch.setattr(icl_markup.export_merged, "with_rows", unprotected)
    with pytest.raises(ExportError, match="can answer with a tag"):
        export_merged(warmed(tiny_backbone("llama")), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_replaced_and_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    model = warmed(tiny_backbone("bert"))
    with pytest.raises(ExportError, match="holds other files"):
        export_merged(model, tmp_path)
    with pytest.raises(ExportError, match="no tags"):
        export_merged(MarkupModel(tiny_backbone("bert"), "plain_letters_multiple_choice"), tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_tag_that_is_a_token_already_gets_another_form(tmp_path: Path) -> None:
    source = tiny_backbone("llama")
    tokenizer = copy.deepcopy(source.tokenizer)
    tokenizer.add_tokens(["<demo>", "<label:1>"])
    model = warmed(Backbone(source.model, tokenizer, "causal", name="with-a-demo-token"))
    merged = export_merged(model, tmp_path / "merged")
    assert merged.placement.tokens["<demo>"] == ("<demo:tag1>", "<demo:tag1:1>")
    assert merged.placement.tokens["<label>"] == ("<label:tag1>", "<label:tag1:1>")
    assert merged.placement.tokens["<input>"] == ("<input>", "<input:1>")


def test_text_prompts_are_the_prompts_ids_or_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    merged = export_merged(warmed(backbone), tmp_path / "merged")
    exported = Exported.load(merged.folder)
    # The tiny T5 has no token for an apostrophe, and its unknown token written as text splits a word.
    assert merged.text_prompts == (backbone.kind != "seq2seq")
    for prompt in exported.prompts(EPISODE, QUERIES):
        assert tuple(exported.tokenizer(exported.text(prompt))["input_ids"]) == prompt.ids
    (spelled,) = exported.prompts(EPISODE, ["<demo> <label:1>"])
    assert spelled.ids.count(merged.placement.ids("<demo>")[0]) == 3
    if backbone.name != "tiny-bert":  # which reads "< demo >" for this, and so no tag
        with pytest.raises(PromptError, match="token ids"):
            exported.text(spelled)


def test_a_damaged_export_is_reported(tmp_path: Path) -> None:
    folder = export_merged(warmed(tiny_backbone("bert")), tmp_path / "merged").folder
    details = json.loads((folder / "icl_markup.json").read_text())
    for content in ("{", "[]", json.dumps({**details, "format": 9}), json.dumps({**details, "tags": [{}]})):
        (folder / "icl_markup.json").write_text(content)
        with pytest.raises(ExportError, match=r"icl_markup\.json"):
            Exported.load(folder)
    with pytest.raises(ExportError, match="is this an exported folder"):
        Exported.load(tmp_path)


def test_a_real_llama_and_the_true_shapes_of_flan_t5(tmp_path: Path) -> None:
    llama = Backbone.load(BackboneConfig(str(shared_path("models", "karpathy-stories260K")), device="cpu"))
    merged = export_merged(warmed(llama), tmp_path / "llama")
    assert merged.resized == 522
    source = shared_path("models", "flan-t5-tokenizer")
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_layers = config.num_decoder_layers = 1
    config.d_model, config.d_ff, config.d_kv = 64, 64, 16
    model = transformers.T5ForConditionalGeneration(config)
    t5 = Backbone(model, transformers.AutoTokenizer.from_pretrained(source), "seq2seq", name="flan-t5-shape")
    merged = export_merged(warmed(t5), tmp_path / "t5")
    assert merged.resized is None
    assert merged.placement.ids("<classification>") == [32100, 32101]
    assert merged.text_prompts
