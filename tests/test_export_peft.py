"""PEFT adapters: what PEFT loads answers as our tags do, and what is read again are the same tags."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.episodes import Query
from icl_markup.errors import ExportError
from icl_markup.export_peft import export_peft
from icl_markup.exported import Exported
from icl_markup.import_peft import import_peft, parse_names, read_adapter
from icl_markup.model import MarkupModel
from icl_markup.template import Template
from tests.conftest import tiny_backbone
from tests.test_export_merged import BACKBONES, EPISODE, QUERIES, warmed


def as_the_card_says(folder: Path, saved: Path) -> PeftModel:
    """Run what the adapter's README says, with transformers and PEFT alone."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "icl_markup" not in code
    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    code = code.replace("path of this folder", str(folder)).replace(repr(name), repr(str(saved)))
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["tokenizer"]) > 0
    return found["model"].eval()


@pytest.mark.parametrize("which", BACKBONES)
def test_peft_loads_the_folder_and_gives_the_same_slot_logits(which: str, tmp_path: Path) -> None:
    backbone = BACKBONES[which]()
    model = warmed(backbone)
    backbone.model.save_pretrained(tmp_path / "base")
    before = backbone.checksum()
    export_peft(model, tmp_path / "adapter")
    assert backbone.checksum() == before
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 4000

    dtype = backbone.model.dtype
    adapted = as_the_card_says(tmp_path / "adapter", tmp_path / "base")
    exported = Exported.load(tmp_path / "adapter")
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for prompt, query in zip(exported.prompts(EPISODE, QUERIES), map(Query, QUERIES), strict=True):
        live = model.markup.compose(replace(EPISODE, queries=(query,)))
        (slot,) = (slot for slot in prompt.slots if slot.is_query)
        inputs = {"input_ids": torch.tensor([prompt.ids])}
        if backbone.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.tensor([[backbone.model.config.decoder_start_token_id]])
        with torch.inference_mode():
            found = adapted(**inputs).logits[0, slot.position, list(slot.candidates)].float()
        wanted = backbone.candidate_logits(Batch.of_prompts([live], all_slots=False), model.table)[0]
        torch.testing.assert_close(found, wanted.detach(), atol=tolerance, rtol=tolerance)


def test_prompts_without_a_tag_are_answered_as_by_the_bare_base(tmp_path: Path) -> None:
    backbone = BACKBONES["untied t5"]()
    backbone.model.save_pretrained(tmp_path / "base")
    export_peft(warmed(backbone), tmp_path / "adapter")
    adapted = as_the_card_says(tmp_path / "adapter", tmp_path / "base")
    bare = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    inputs = {"input_ids": torch.arange(5, 60)[None], "decoder_input_ids": torch.tensor([[0, 7, 9]])}
    with torch.inference_mode():
        assert torch.equal(adapted(**inputs).logits, bare(**inputs).logits)


def test_an_exported_adapter_is_imported_with_its_names_template_and_values(backbone: Backbone, tmp_path: Path) -> None:
    model = MarkupModel(backbone, "markup_letters", seed=4, answers="names", length_normalised=False)
    export_peft(model, tmp_path / "adapter")
    again = import_peft(tmp_path / "adapter", backbone)
    assert torch.equal(again.table.rows, model.table.rows)
    assert (again.template.source, again.answers, again.length_normalised) == (model.template.source, "names", False)
    again.save(tmp_path / "tags")
    loaded = MarkupModel.from_tags(tmp_path / "tags", backbone)
    assert loaded.classify(QUERIES, ["lost card", "weather"]) == model.classify(QUERIES, ["lost card", "weather"])


TEMPLATE = """@tag <demo> width=2
@tag <is>
@option
 {symbol}: {name}
@demo
<demo> {text} <is> {label}
@query
<demo> {text} <is> {label}
"""


def trained_with_peft(backbone: Backbone, folder: Path, **saving: object) -> tuple[list[int], torch.Tensor]:
    """An adapter as PEFT itself trains and saves it, with a tokenizer whose tokens have names."""
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.add_tokens(["<demo>", "<is>", "<demo:1>"], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(["<is>", "<demo>", "<demo:1>"])
    base = copy.deepcopy(backbone.model)
    base.resize_token_embeddings(len(tokenizer))
    adapted = get_peft_model(base, TrainableTokensConfig(token_indices=ids))
    (values,) = (value for name, value in adapted.named_parameters() if "trainable_tokens_delta" in name)
    with torch.no_grad():
        values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    adapted.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return ids, values.detach()


def test_a_foreign_adapter_takes_names_from_its_tokenizer_or_from_the_user(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    ids, values = trained_with_peft(backbone, tmp_path / "adapter")  # with the whole table beside the rows
    template = Template.parse(TEMPLATE)
    with pytest.raises(ExportError, match="give the template"):
        import_peft(tmp_path / "adapter", backbone)
    model = import_peft(tmp_path / "adapter", backbone, template)
    assert torch.equal(model.table.vectors()["<demo>"], values[1:])
    assert torch.equal(model.table.vectors()["<is>"], values[:1])

    (tmp_path / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match="name them with --tag"):
        import_peft(tmp_path / "adapter", backbone, template)
    named = import_peft(
        tmp_path / "adapter", backbone, template, parse_names([f"<demo>={ids[2]},{ids[1]}", f"<is>={ids[0]}"])
    )
    assert torch.equal(named.table.vectors()["<demo>"], values[[2, 1]])
    for words, message in (
        ([f"<demo>={ids[2]}", f"<is>={ids[0]}"], "does not fit template"),
        ([f"<is>={ids[0]}"], "has the tag <demo>"),
        (["<is>=7"], "no vector for id 7"),
        (["is=7"], "write a tag and the ids"),
        (["<is>=7", "<is>=8"], "given twice"),
    ):
        with pytest.raises(ExportError, match=message):
            import_peft(tmp_path / "adapter", backbone, template, parse_names(words))


def test_an_adapter_for_another_backbone_is_refused(tmp_path: Path) -> None:
    export_peft(warmed(tiny_backbone("bert")), tmp_path / "adapter")
    with pytest.raises(ExportError, match="another backbone"):
        import_peft(tmp_path / "adapter", tiny_backbone("roberta"))


def test_what_is_no_such_adapter_or_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export_peft(warmed(tiny_backbone("bert")), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    ((key, value),) = tensors.items()

    def refused(message: str, **changed: object) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ExportError, match=message):
            read_adapter(folder)
        (folder / "adapter_config.json").write_text(json.dumps(config))

    refused("adapter of type LORA", peft_type="LORA")
    refused("no list of ids", token_indices={"a": 1})
    refused("stands twice", token_indices=[1] * len(value))
    refused("a table of shape", token_indices=[1])
    for content, message in (
        ({}, "0 tables"),
        ({key: value, f"other.{key}": value.clone()}, "2 tables"),
        ({key: value * float("nan")}, "not finite"),
    ):
        save_file(content, folder / "adapter_model.safetensors")
        with pytest.raises(ExportError, match=message):
            read_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ExportError, match="damaged"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match="no such file"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match="pickle"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ExportError, match="PEFT adapter"):
        read_adapter(folder)
