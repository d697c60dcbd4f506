"""Attention from the slot: it is the model's own, it sums to one, and the model is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from icl_markup.attention import SlotAttention, slot_attention
from icl_markup.attention_plots import caption, picture
from icl_markup.backbone import Backbone
from icl_markup.chat import ChatConfig
from icl_markup.cli import main
from icl_markup.episodes import Query
from icl_markup.errors import BackboneError, PromptError
from icl_markup.model import MarkupModel
from icl_markup.plot_style import to_png
from tests.chat_models import chat_backbone
from tests.conftest import KINDS, tiny_backbone
from tests.test_markup import an_episode


@pytest.mark.parametrize("template", ["markup_letters", "plain_letters_text_label"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_sums_to_one_in_every_layer_and_over_parts_and_kinds(kind: str, template: str) -> None:
    model = MarkupModel(tiny_backbone(kind), template)
    found = slot_attention(model, an_episode())
    assert found.weights.shape == (2, len(model.markup.compose(an_episode()).ids)) and (found.weights >= 0).all()
    for total in (found.weights.sum(1), found.by_part.sum(1), sum(found.by_kind.values())):
        assert total == pytest.approx(np.ones(2), abs=1e-5)
    assert [part.kind for part in found.parts if part.kind not in ("head", "end")] == (
        ["option"] * 3 + ["demonstration"] * 3 + ["query"]
    )
    assert ("tag" in found.by_kind) == (template == "markup_letters")
    edges = [(part.start, part.stop) for part in found.parts]
    assert edges[0][0] == 0 and edges[-1][1] == len(found.kinds)
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    assert sum(found.answer.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("answers", "options", "label"),
    [
        ("symbols", ["A: lost card", "B: opening hours", "C: complaint"], "A"),
        ("names", ["lost card", "opening hours", "complaint"], "lost card"),
    ],
)
def test_parts_are_named_after_what_they_show(answers: Any, options: list[str], label: str) -> None:
    found = slot_attention(MarkupModel(tiny_backbone("llama"), answers=answers), an_episode())
    names = [part.name for part in found.parts]
    assert names[1:4] == options
    assert names[4].startswith(f"I lost my card → {label}") and names[-1] == "query: when do you open"


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_weights_are_what_transformers_tells_for_the_same_ids(kind: str) -> None:
    model = MarkupModel(tiny_backbone(kind), "plain_letters_input_category")
    episode, backbone = an_episode(), model.backbone
    found = slot_attention(model, episode)
    prompt = model.markup.compose(episode)
    ids = torch.tensor([prompt.ids])
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[backbone.model.config.decoder_start_token_id]])
    backbone.model.set_attn_implementation("eager")
    with torch.no_grad():
        own = backbone.model(**inputs, output_attentions=True)
    layers = own.cross_attentions if kind == "t5" else own.attentions
    rows = [layer[0, :, prompt.slots[-1].position].mean(0).numpy() for layer in layers]
    assert found.weights == pytest.approx(np.stack(rows), abs=1e-5)


def test_a_causal_slot_sees_all_that_precedes_it_and_a_texts_part_follows_the_text() -> None:
    model = MarkupModel(tiny_backbone("llama"))
    short, long = (slot_attention(model, an_episode([text, "b", "c"])) for text in ("card", "card " * 20))
    sizes = [[part.stop - part.start for part in found.parts] for found in (short, long)]
    grown = [i for i, (one, other) in enumerate(zip(*sizes, strict=True)) if one != other]
    assert [short.parts[i].kind for i in grown] == ["demonstration"]
    assert (long.weights > 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_the_model_is_left_as_it_was(kind: str, attention: str) -> None:
    model = MarkupModel(tiny_backbone(kind))
    network, episode = model.backbone.model, an_episode()
    network.set_attn_implementation(attention)
    configs = {id(m.config): m.config for m in network.modules() if hasattr(m, "config")}
    before, answer = model.backbone.checksum(), list(model.predictions(episode)[0].probabilities.values())
    first = slot_attention(model, episode)
    assert {config._attn_implementation for config in configs.values()} == {attention}
    assert model.backbone.checksum() == before
    again = slot_attention(model, episode)
    assert np.array_equal(first.weights, again.weights)
    for found in (first.answer, model.predictions(episode)[0].probabilities):
        assert list(found.values()) == pytest.approx(answer, abs=1e-6)


def test_the_end_of_a_chat_is_a_part_of_its_own() -> None:
    model = MarkupModel(chat_backbone("llama3"), chat=ChatConfig(True, "Be brief."))
    found = slot_attention(model, an_episode())
    assert [found.parts[0].kind, found.parts[-1].kind] == ["head", "end"]
    assert found.parts[-1].stop - found.parts[-1].start == len(model.layout.suffix)
    assert found.weights.sum(1) == pytest.approx(np.ones(2), abs=1e-5)


def test_whole_names_have_a_slot_too() -> None:
    found = slot_attention(MarkupModel(tiny_backbone("llama"), answers="names"), an_episode())
    assert found.weights.sum(1) == pytest.approx(np.ones(2), abs=1e-5)
    assert found.parts[1].name.endswith("lost card") and found.parts[4].kind == "demonstration"


def test_what_cannot_be_shown_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MarkupModel(tiny_backbone("bert"))
    two = replace(an_episode(), queries=(Query("a"), Query("b")))
    with pytest.raises(PromptError, match="2 queries"):
        slot_attention(model, two)
    silent = MarkupModel(tiny_backbone("llama"))

    class Silent:
        attentions = None

    original = silent.backbone.model.forward
    monkeypatch.setattr(
        silent.backbone.model,
        "forward",
        lambda *a, output_attentions=None, **k: Silent() if output_attentions else original(*a, **k),
    )
    with pytest.raises(BackboneError, match="does not tell"):
        slot_attention(silent, an_episode())


def test_the_picture_shows_every_part_and_is_the_same_bytes_twice() -> None:
    found = both(tiny_backbone("llama"))
    content = to_png(picture(found, "tiny"), few_colours=False)
    assert content == to_png(picture(found, "tiny"), few_colours=False)
    figure = picture(found, "tiny")
    to_png(figure)
    texts = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
    for name in (
        "option A: lost card",
        "query: when do you open",
        "markup_letters",
        "plain_letters_text_label",
        "tags",
        "tokens",
    ):
        assert name in texts
    share = 100 * found[0].by_part[0, 1]
    assert (f"{share:.0f}" if share >= 0.5 else "<1") in texts
    told = caption(found)
    assert (
        "in markup_letters, mean over 2 layers" in told and "in plain_letters_text_label" in told and "option" in told
    )


def both(backbone: Backbone) -> list[SlotAttention]:
    return [
        slot_attention(MarkupModel(backbone, template), an_episode())
        for template in ("markup_letters", "plain_letters_text_label")
    ]


def test_the_command_prints_draws_and_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tiny_backbone("llama")
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    place = tmp_path / "attention.png"
    asked = ["attention", "--backbone", str(tmp_path / "model"), "--labels", "lost card", "weather", "--demo",
             "my card is gone", "lost card", "--picture", str(place)]  # fmt: skip
    assert main([*asked, "--", "will it rain"]) == 0
    shown = capsys.readouterr().out
    assert "attention from the slot" in shown and "all of kind tag" in shown and "picture: " in shown
    assert place.read_bytes().startswith(b"\x89PNG")
    assert "plain_words_text_label" in shown, "another template that is answered alike"
    assert main([*asked, "--json", "--against", "none", "--", "will it rain"]) == 0
    [only] = json.loads(capsys.readouterr().out)
    assert only["template"] == "markup_words" and only["layers"] == 2
    total = np.array([part["attention"] for part in only["parts"]]).sum(0)
    assert total == pytest.approx([1, 1], abs=1e-5)
    assert sum(part["tokens"] for part in only["parts"]) == only["tokens"]
    assert main(["attention", "--backbone", str(tmp_path / "model"), "--labels", "a", "b", "--picture", "x.gif", "--",
                 "y"]) == 2  # fmt: skip
    assert "end in .png" in capsys.readouterr().err
