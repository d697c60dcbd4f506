"""Engines that install here give, from a merged checkpoint, the answers that `MarkupModel` gives."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from icl_markup.backbone import Backbone
from icl_markup.episodes import Query
from icl_markup.export_merged import export_merged
from icl_markup.exported import Exported
from icl_markup.model import MarkupModel
from icl_markup.prompt import Prompt
from tests.conftest import TEXTS, tiny_backbone
from tests.test_export_merged import tied_llama, untied_t5, warmed

LABELS = list(TEXTS)
ASKED = replace(
    MarkupModel.episode(LABELS, [("my card is gone", "lost card"), ("is it cold outside", "weather")]),
    queries=tuple(Query(text) for texts in TEXTS.values() for text in texts if "'" not in text),
)
Case = tuple[Exported, list[Prompt], list[int]]


def loud(backbone: Backbone, factor: float = 4.0) -> Backbone:
    """Make the answers of random weights depend on the prompt: with small ones they are nearly always the same."""
    with torch.no_grad():
        for name, value in backbone.model.named_parameters():
            if value.ndim == 2 and "embed" not in name and "shared" not in name:
                value.mul_(factor)
    return backbone


def one_layer_bert() -> Backbone:
    source = tiny_backbone("bert")
    config = copy.deepcopy(source.model.config)
    config.num_hidden_layers = 1
    bert = Backbone(transformers.BertForMaskedLM(config), source.tokenizer, "masked", name="one-layer-bert")
    return loud(bert, 12.0)


BACKBONES = {
    "llama": tied_llama,
    "t5": lambda: loud(untied_t5()),
    "bert": one_layer_bert,
    "roberta": lambda: loud(tiny_backbone("roberta")),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A merged checkpoint of every kind, its prompts, and our own answers, which are not all the same."""
    made = {}
    for name, build in BACKBONES.items():
        model = warmed(build())
        for _ in range(12):  # tokenizers are trained anew, and no two trainings are the same
            if len({int(one.scores.argmax()) for one in model.scores([ASKED])[0]}) > 1:
                break
            model = warmed(loud(model.backbone, 1.5))
        merged = export_merged(model, tmp_path_factory.mktemp(name) / "merged")
        exported = Exported.load(merged.folder)
        ours = [int(one.scores.argmax()) for one in model.scores([ASKED])[0]]
        made[name] = (exported, exported.prompts(ASKED), ours)
    assert all(len(set(ours)) > 1 for _, _, ours in made.values())
    return made


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    return importlib.import_module("engines")


@pytest.mark.parametrize("name", BACKBONES)
def test_transformers_pipelines_give_our_answers(name: str, cases: dict[str, Case], engines: ModuleType) -> None:
    exported, prompts, ours = cases[name]
    assert engines.ask_pipeline(exported, prompts)() == ours


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_lm_eval_harness_gives_our_answers(name: str, cases: dict[str, Case], engines: ModuleType) -> None:
    pytest.importorskip("lm_eval", reason='lm-eval-harness is not installed: pip install "icl-markup[bench]"')
    exported, prompts, ours = cases[name]
    assert engines.ask_lm_eval(exported, prompts)() == ours


@pytest.mark.parametrize(("name", "shared_head"), [("llama", False), ("llama", True), ("t5", False)])
def test_ctranslate2_gives_our_answers(
    name: str, shared_head: bool, cases: dict[str, Case], engines: ModuleType
) -> None:
    pytest.importorskip("ctranslate2", reason='CTranslate2 is not installed: pip install "icl-markup[bench]"')
    exported, prompts, ours = cases[name]
    assert engines.ask_ctranslate2(exported, prompts, exported.folder.parent / "ct2", shared_head=shared_head)() == ours


def test_onnx_runtime_gives_our_answers(cases: dict[str, Case], engines: ModuleType, tmp_path: Path) -> None:
    for needed in ("onnxruntime", "onnxscript"):
        pytest.importorskip(needed, reason='ONNX Runtime is not installed: pip install "icl-markup[bench]"')
    exported, prompts, ours = cases["bert"]
    assert engines.ask_onnxruntime(exported, prompts, tmp_path / "onnx")() == ours
