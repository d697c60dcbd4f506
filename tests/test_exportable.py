"""Architectures that do something of their own to embeddings are exported right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from icl_markup.backbone import Backbone
from icl_markup.episodes import Query
from icl_markup.errors import BackboneError, ExportError
from icl_markup.export_merged import export_merged
from icl_markup.export_peft import export_peft
from icl_markup.exportable import check_exportable, embedding_scale
from icl_markup.exported import Exported
from icl_markup.import_peft import import_peft
from icl_markup.model import MarkupModel
from tests.conftest import byte_level_tokenizer, tiny_backbone
from tests.test_export_merged import EPISODE, QUERIES, tied_llama, warmed
from tests.test_export_peft import as_the_card_says
from tests.test_quantisation import checkpoint, load, needs

TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
LAYERS = ["sliding_attention", "full_attention"]


def decoder(name: str, **more: object) -> Backbone:
    torch.manual_seed(0)
    config = {
        "vocab_size": 420, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, **TOKENS,
    }  # fmt: skip
    suffix = "TextConfig" if name in ("Gemma3", "Gemma3n", "Gemma4") else "Config"
    settings = getattr(transformers, name + suffix)(**{**config, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    return Backbone(model, byte_level_tokenizer(mask=False), "causal", name=name, max_length=256)


def pair(name: str, **more: object) -> Backbone:
    torch.manual_seed(0)
    size = {"d_model": 32, "max_position_embeddings": 256, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    for side in ("encoder", "decoder"):
        size |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    settings = getattr(transformers, f"{name}Config")(vocab_size=420, **TOKENS, **size, **more)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(settings)
    return Backbone(model, byte_level_tokenizer(mask=False), "seq2seq", name=name, max_length=256)


def full_mt5() -> Backbone:
    torch.manual_seed(0)
    settings = transformers.MT5Config(
        vocab_size=420, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.MT5ForConditionalGeneration(settings)
    return Backbone(model, byte_level_tokenizer(mask=False), "seq2seq", name="mt5", max_length=256)


def causal_bart() -> Backbone:
    torch.manual_seed(0)
    settings = transformers.BartConfig(
        vocab_size=420, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
        max_position_embeddings=256, is_encoder_decoder=False, scale_embedding=True, **TOKENS,
    )  # fmt: skip
    model = transformers.BartForCausalLM(settings)
    return Backbone(model, byte_level_tokenizer(mask=False), "causal", name="causal-bart", max_length=256)


SCALED: dict[str, Callable[[], Backbone]] = {
    "gemma": lambda: decoder("Gemma"),
    "gemma 2": lambda: decoder("Gemma2"),
    "gemma 3": lambda: decoder("Gemma3", layer_types=LAYERS),
    "gemma 3n": lambda: decoder(
        "Gemma3n", layer_types=LAYERS, vocab_size_per_layer_input=420, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
    ),
    "a bart's decoder": causal_bart,
}  # fmt: skip
OTHERS: dict[str, Callable[[], Backbone]] = {
    "granite": lambda: decoder("Granite", embedding_multiplier=12.0, logits_scaling=8.0, tie_word_embeddings=True),
    "bart": lambda: pair("Bart"),
    "bart that scales": lambda: pair("Bart", scale_embedding=True),
    "pegasus, which scales elsewhere": lambda: pair("Pegasus", scale_embedding=True),
    "mt5 without spare rows": full_mt5,
}


@pytest.mark.parametrize("which", [*SCALED, *OTHERS])
def test_what_an_architecture_does_to_embeddings_is_done_to_tags_as_well(which: str, tmp_path: Path) -> None:
    backbone = {**SCALED, **OTHERS}[which]()
    assert (embedding_scale(backbone) != 1) == (which in SCALED or which == "bart that scales")
    model = warmed(backbone)
    backbone.model.save_pretrained(tmp_path / "base")
    merged = export_merged(model, tmp_path / "merged")
    assert merged.agreement.largest_difference <= 1e-5
    export_peft(model, tmp_path / "adapter")
    again = import_peft(tmp_path / "adapter", backbone)
    torch.testing.assert_close(again.table.rows, model.table.rows, rtol=1e-6, atol=1e-6)

    ours = model.scores([replace(EPISODE, queries=tuple(map(Query, QUERIES)))])[0]
    loaded = transformers.AutoModelForCausalLM if backbone.kind == "causal" else transformers.AutoModelForSeq2SeqLM
    for engine, folder in (
        (loaded.from_pretrained(merged.folder), merged.folder),
        (as_the_card_says(tmp_path / "adapter", tmp_path / "base"), tmp_path / "adapter"),
    ):
        for prompt, live in zip(Exported.load(folder).prompts(EPISODE, QUERIES), ours, strict=True):
            inputs = {"input_ids": torch.tensor([prompt.ids])}
            if backbone.kind == "seq2seq":
                inputs["decoder_input_ids"] = torch.tensor([[backbone.model.config.decoder_start_token_id]])
            with torch.inference_mode():
                found = engine.eval()(**inputs).logits[0, prompt.slots[-1].position, list(prompt.slots[-1].candidates)]
            torch.testing.assert_close(found, live.scores, rtol=1e-4, atol=1e-4)


def test_a_bart_keeps_its_head_tied_and_cannot_generate_a_tag(tmp_path: Path) -> None:
    merged = export_merged(warmed(pair("Bart")), tmp_path / "merged")
    bart = transformers.AutoModelForSeq2SeqLM.from_pretrained(merged.folder)
    assert bart.lm_head.weight is bart.model.shared.weight
    tags = merged.placement.all_ids
    with torch.inference_mode():
        logits = bart(torch.arange(5, 60)[None], decoder_input_ids=torch.tensor([[2, 7, 9]])).logits
    assert logits.softmax(-1)[..., tags].max() == 0


def test_a_model_that_looks_ids_up_in_every_layer_takes_no_tags_but_plain_words() -> None:
    per_layer = {"vocab_size_per_layer_input": 420, "hidden_size_per_layer_input": 8}
    backbone = decoder("Gemma4", layer_types=LAYERS, **per_layer, num_kv_shared_layers=0, global_head_dim=8)
    with pytest.raises(BackboneError, match=r"in every layer.*without such tables"):
        MarkupModel(backbone)
    assert MarkupModel(backbone, "plain_letters_multiple_choice").classify(["is it cold"], ["weather", "lost card"])
    without = {**per_layer, "hidden_size_per_layer_input": 0}
    MarkupModel(decoder("Gemma4", layer_types=LAYERS, **without, num_kv_shared_layers=0, global_head_dim=8))


def test_what_cannot_be_written_is_refused_before_or_after_and_never_left_behind(tmp_path: Path) -> None:
    m2m = warmed(pair("M2M100"))  # without a tied head, transformers gives it no embedding of its decoder
    with pytest.raises(ExportError, match=r"M2M100\w* cannot be loaded again.*PEFT adapter"):
        export_merged(m2m, tmp_path / "merged")
    export_peft(m2m, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    double = tied_llama()
    double.model.double()
    with pytest.raises(ExportError, match=r"float64 are not exported.*bf16"):
        check_exportable(warmed(double))
    with pytest.raises(ExportError, match="has no tags"):
        check_exportable(MarkupModel(tiny_backbone("bert"), "plain_letters_multiple_choice"))


def test_tags_of_a_quantised_backbone_are_exported_from_the_original(tmp_path: Path) -> None:
    needs("bitsandbytes-nf4")
    place = checkpoint(tmp_path, "llama")
    quantised = MarkupModel(load(place, "bitsandbytes-nf4"), seed=3)
    with pytest.raises(ExportError, match="is quantised; export the tags with the model that it was made from"):
        check_exportable(quantised)
    quantised.save(tmp_path / "tags")
    assert export_merged(MarkupModel.from_tags(tmp_path / "tags", load(place)), tmp_path / "merged").agreement.prompts
