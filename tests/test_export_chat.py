"""Tags that stand in a chat are given away with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from icl_markup.chat import ChatConfig
from icl_markup.episodes import Query
from icl_markup.export_merged import export_merged
from icl_markup.export_peft import export_peft
from icl_markup.exported import Exported
from icl_markup.import_peft import import_peft
from icl_markup.model import MarkupModel
from tests.chat_models import ANSWERING, chat_backbone
from tests.test_export_merged import EPISODE, QUERIES

ASKED = replace(EPISODE, queries=tuple(map(Query, QUERIES)))


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", ANSWERING)
def test_exports_of_tags_in_a_chat_ask_in_that_chat(name: str, system: str, tmp_path: Path) -> None:
    model = MarkupModel(chat_backbone(name), "markup_letters", seed=3, chat=ChatConfig(enabled=True, system=system))
    merged = export_merged(model, tmp_path / "merged")
    exported = Exported.load(merged.folder)
    assert exported.chat == model.chat
    engine = transformers.AutoModelForCausalLM.from_pretrained(merged.folder)
    prompts = exported.prompts(EPISODE, QUERIES)
    for prompt, ours, live in zip(prompts, model.markup.compose_each(ASKED), model.scores([ASKED])[0], strict=True):
        assert prompt.ids == tuple(exported.placement.moved(ours.ids))
        with torch.inference_mode():
            found = engine(torch.tensor([prompt.ids])).logits[0, -1, list(prompt.slots[-1].candidates)]
        torch.testing.assert_close(found, live.scores, rtol=1e-4, atol=1e-4)
    if merged.text_prompts:
        text = exported.text(prompts[0])
        assert tuple(exported.tokenizer(text)["input_ids"]) == prompts[0].ids
        assert system in text


def test_an_adapter_brings_its_chat_back(tmp_path: Path) -> None:
    backbone = chat_backbone("llama3")
    model = MarkupModel(backbone, "markup_letters", seed=3, chat=ChatConfig(enabled=True, system="Be brief."))
    export_peft(model, tmp_path / "adapter")
    again = import_peft(tmp_path / "adapter", backbone)
    assert again.chat == model.chat
    assert again.markup.compose_each(ASKED) == model.markup.compose_each(ASKED)


def test_byte_level_chats_can_be_asked_as_text(tmp_path: Path) -> None:
    for name in ("llama3", "qwen2_5"):
        model = MarkupModel(
            chat_backbone(name), "markup_letters", seed=3, chat=ChatConfig(enabled=True, system="Be brief.")
        )
        assert export_merged(model, tmp_path / name).text_prompts
