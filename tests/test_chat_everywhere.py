"""Chats from warm-up to answer: tags, trained models and classifiers remember theirs, and nobody else is affected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from icl_markup.chat import ChatConfig
from icl_markup.classifier import MarkupClassifier
from icl_markup.cli import main
from icl_markup.errors import ConfigError, TagFileError, WarmupError
from icl_markup.experiment_config import ExperimentConfig, MethodConfig
from icl_markup.metaicl import MetaIclConfig, load_metaicl, run_metaicl
from icl_markup.model import MarkupModel
from icl_markup.tagfile import read_tags
from icl_markup.variants import variants
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig, run_warmup
from tests.chat_models import chat_backbone
from tests.conftest import TEXTS, tiny_task
from tests.test_markup import an_episode

CHAT = ChatConfig(enabled=True, system="Be brief.")
SHORT: dict[str, Any] = {"optimiser": OptimiserConfig(steps=2, warmup_steps=0, batch_tokens=512, window=4)}
X = [text for texts in TEXTS.values() for text in texts[:2]]
Y = [label for label, texts in TEXTS.items() for _ in texts[:2]]


def without_template() -> Any:
    """The same backbone, whose tokenizer has lost its chat template: what is loaded must not need it."""
    backbone = chat_backbone("llama3")
    backbone.tokenizer.chat_template = None
    return backbone


@pytest.fixture(autouse=True)
def _template_comes_back() -> Any:
    tokenizer = chat_backbone("llama3").tokenizer
    kept = tokenizer.chat_template
    yield
    tokenizer.chat_template = kept


def test_tags_that_are_warmed_up_in_a_chat_remember_it(tmp_path: Path) -> None:
    config = WarmupConfig(
        tasks=[], output=str(tmp_path / "run"), chat=CHAT, validation=ValidationConfig(every=2, episodes=2), **SHORT
    )
    backbone = chat_backbone("llama3")
    result = run_warmup(config, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)
    prompt = result.model.markup.compose(an_episode())
    assert "<|start_header_id|>system<|end_header_id|>\n\nBe brief." in backbone.encoder.decode(list(prompt.ids))
    loaded = MarkupModel.from_tags(result.folder, without_template())
    assert loaded.chat == result.model.chat
    assert loaded.markup.compose(an_episode()) == prompt
    assert "Be brief." in (result.folder / "README.md").read_text()
    with pytest.raises(WarmupError, match="another chat"):
        other = WarmupConfig(tasks=[], output=str(tmp_path / "run"), resume=True, **SHORT)
        run_warmup(other, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)


def test_a_tag_folder_without_a_chat_is_as_it_was_and_a_damaged_chat_is_named(tmp_path: Path) -> None:
    backbone = chat_backbone("llama3")
    MarkupModel(backbone).save(tmp_path / "plain")
    details = json.loads((tmp_path / "plain" / "tags.json").read_text())
    assert details["format"] == 1 and "chat" not in details and read_tags(tmp_path / "plain").chat is None
    MarkupModel(backbone, chat=CHAT).save(tmp_path / "chat")
    path = tmp_path / "chat" / "tags.json"
    details = json.loads(path.read_text())
    assert details["format"] == 2, "a version that knows no chats must not read it"
    for chat in (None, [], {**details["chat"], "before": 3}, {"before": "x"}):
        path.write_text(json.dumps({**details, "chat": chat}))
        with pytest.raises(TagFileError, match="damaged"):
            read_tags(tmp_path / "chat")


def test_a_warm_up_that_began_before_there_were_chats_can_be_resumed(tmp_path: Path) -> None:
    from icl_markup import checkpoint

    config = WarmupConfig(tasks=[], output=str(tmp_path / "run"), **SHORT)
    backbone = chat_backbone("llama3")
    run_warmup(config, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)
    path = tmp_path / "run" / "checkpoint.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    told = json.loads(header["__metadata__"]["details"])
    del told["config"]["chat"]
    told.pop("sha256", None)  # nor were there checksums
    header["__metadata__"].pop("sha256", None)
    header["__metadata__"]["details"] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    assert checkpoint.has_checkpoint(tmp_path / "run")
    again = WarmupConfig(tasks=[], output=str(tmp_path / "run"), resume=True, **SHORT)
    run_warmup(again, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)


@pytest.mark.parametrize("template", ["markup_letters", "plain_letters_input_category"])
def test_a_classifier_takes_its_chat_along(template: str, tmp_path: Path) -> None:
    backbone = chat_backbone("llama3")
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    classifier = MarkupClassifier(backbone=str(tmp_path / "model"), template=template, chat=CHAT, device="cpu")
    classifier.fit(X, Y)
    prompt, _ = classifier.compose("when do you open")
    assert "Be brief." in backbone.encoder.decode(list(prompt.ids))
    found = classifier.predict_proba(["when do you open"])
    classifier.save(tmp_path / "saved")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    loaded = MarkupClassifier.load(tmp_path / "saved", device="cpu")
    assert loaded.compose("when do you open")[0] == prompt
    assert loaded.predict_proba(["when do you open"]) == pytest.approx(found, abs=1e-6)


def test_tags_bring_their_own_chat_along() -> None:
    with pytest.raises(ConfigError, match="chat: tags bring along"):
        MarkupClassifier("somewhere", chat=CHAT).fit(X, Y)
    with pytest.raises(ConfigError, match="is no ChatConfig"):
        MarkupClassifier(chat=True).fit(X, Y)  # type: ignore[arg-type]


def test_the_commands_know_chats(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = chat_backbone("llama3")
    backbone.model.save_pretrained("model")
    backbone.tokenizer.save_pretrained("model")
    shutil.copy("model/chat_template.jinja", "kept.jinja")
    chat = ["--chat", "--system", "Be brief."]
    labels = ["--labels", "lost card", "weather"]
    assert main(["show", "--backbone", "model", *chat, *labels, "--", "will it rain"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("<|begin_of_text|>") == 1 and shown.count("<|start_header_id|>") == 3
    assert main(["predict", "--backbone", "model", *chat, *labels, "--", "will it rain"]) == 0
    answer = json.loads(capsys.readouterr().out)
    model = MarkupModel.untrained("model", chat=CHAT)
    [wanted] = model.classify(["will it rain"], ["lost card", "weather"])
    assert answer["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-3)
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(X, Y, strict=True)]
    Path("examples.jsonl").write_text("\n".join(rows))
    assert main(["fit", "examples.jsonl", "--backbone", "model", *chat, "--out", "intents", "--device", "cpu"]) == 0
    assert main(["predict", "--classifier", "intents", "--", "will it rain"]) == 0
    assert main(["predict", "--classifier", "intents", "--chat", "--", "x"]) == 2
    assert "--classifier brings its own chat" in capsys.readouterr().err
    MarkupModel.untrained("model").save("tags")
    assert main(["show", "--tags", "tags", "--chat", *labels, "--", "x"]) == 2
    assert "--tags brings along the chat" in capsys.readouterr().err
    assert main(["show", "--backbone", "model", "--system", "x", *labels, "--", "x"]) == 2
    assert "--chat" in capsys.readouterr().err


def test_an_experiment_composes_in_the_chat_and_keeps_apart_what_was_measured_without() -> None:
    backbone = chat_backbone("llama3")
    methods = [MethodConfig("plain", templates=["plain_letters_input_category"]), MethodConfig("tags_untrained")]
    found = {}
    for chat in (ChatConfig(), CHAT):
        config = ExperimentConfig("e", tasks=[], methods=methods, chat=chat)
        found[chat.enabled] = list(variants(config, backbone, lambda: None))  # type: ignore[arg-type,return-value]
    assert not {v.identity for v in found[True]} & {v.identity for v in found[False]}
    for variant in found[True]:
        assert variant.make().model.model.chat.system == "Be brief."  # type: ignore[attr-defined]


def test_a_backbone_that_is_trained_in_a_chat_remembers_it(tmp_path: Path) -> None:
    backbone = chat_backbone("llama3")
    config = MetaIclConfig(tasks=[], output=str(tmp_path / "run"), chat=CHAT, **SHORT)
    result = run_metaicl(config, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)
    loaded, _ = load_metaicl(result.folder, without_template())
    assert loaded.chat == result.model.chat is not None
    assert loaded.markup.compose(an_episode()) == result.model.markup.compose(an_episode())
