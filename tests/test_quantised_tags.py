"""Tags that travel between a backbone and its quantised forms, and are refused by other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icl_markup.backbone import Backbone
from icl_markup.classifier import MarkupClassifier
from icl_markup.cli import main
from icl_markup.errors import TagFileError
from icl_markup.fingerprint import Fingerprint
from icl_markup.loading import BackboneConfig, config_of
from icl_markup.model import MarkupModel
from icl_markup.quantisation import linear_layers
from icl_markup.tagfile import read_tags
from icl_markup.warmup import OptimiserConfig, WarmupResult, run_warmup
from tests.conftest import TEXTS, tiny_task
from tests.test_quantisation import FORMS, GRID, LABELS, checkpoint, gpt2, load, needs
from tests.test_warmup import config_for

DEMOS = [("I lost my card", "lost card"), ("will it rain", "weather"), ("are you open", "opening hours")]
LIBRARY = "bitsandbytes-nf4"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tiny checkpoints."""
    return tmp_path_factory.mktemp("travel")


def warm_up(folder: Path, backbone: Backbone) -> WarmupResult:
    plan = OptimiserConfig(steps=2, learning_rate=0.5, warmup_steps=0, batch_tokens=600, window=4)
    config = config_for(folder, optimiser=plan)
    return run_warmup(config, tasks=[tiny_task()], validation_tasks=[], backbone=backbone, progress=False)


def difference(one: Backbone, other: Backbone) -> str | None:
    first, second = Fingerprint.of(one), Fingerprint.of(other)
    assert (first.difference(second) is None) == (second.difference(first) is None)
    return first.difference(second)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("llama", "bitsandbytes-nf4"),
        ("llama", "torchao-int8"),
        ("t5", "bitsandbytes-nf4"),
        ("t5", "bitsandbytes-int8"),
        ("bert", "bitsandbytes-int8"),
        ("bert", "bitsandbytes-fp4"),
        ("bert", "torchao-int8"),
    ],
)
def test_tags_warmed_up_on_a_quantised_backbone_are_used_on_every_form_of_it(
    kind: str, form: str, checkpoints: Path, tmp_path: Path
) -> None:
    place = checkpoint(checkpoints, kind)
    backbone = load(place, form)
    stored = backbone.checksum()
    result = warm_up(tmp_path / "run", backbone)
    assert result.summary["quantisation"] == form
    assert backbone.checksum() == stored, "codes, scales, biases and all else are as they were"
    again = warm_up(tmp_path / "again", load(place, form))
    assert (result.folder / "tags.safetensors").read_bytes() == (again.folder / "tags.safetensors").read_bytes()
    assert torch.isfinite(result.model.table.rows).all()
    fresh = MarkupModel(backbone, "markup_letters")
    assert not torch.equal(fresh.table.rows, result.model.table.rows), "warm-up moved them"

    saved = read_tags(result.folder)
    assert saved.backbone["quantisation"] == form
    assert f"`{Path(place).name}`, quantised (`{form}`)" in (result.folder / "README.md").read_text()
    by_itself = MarkupModel.from_tags(result.folder)
    assert by_itself.backbone.quantisation == form
    for other, dtype in (("none", "fp32"), ("none", "bf16"), (form, "bf16")):
        moved = MarkupModel.from_tags(result.folder, load(place, other, dtype))
        assert torch.equal(moved.table.rows, result.model.table.rows)
        assert len(moved.classify(["where is it"], LABELS, DEMOS)) == 1


@pytest.mark.parametrize(("kind", "form"), [pair for pair in GRID if pair[0] != "roberta"])
def test_tags_warmed_up_unquantised_are_used_quantised(kind: str, form: str, checkpoints: Path, tmp_path: Path) -> None:
    place = checkpoint(checkpoints, kind)
    forms = [load(place, form, dtype) for dtype in ("fp32", "bf16")]
    for dtype in ("fp32", "bf16"):
        source = MarkupModel(load(place, "none", dtype), "markup_letters", seed=2)
        source.save(tmp_path / dtype)
        for backbone in forms:
            assert torch.equal(MarkupModel.from_tags(tmp_path / dtype, backbone).table.rows, source.table.rows)


@pytest.mark.parametrize("form", ["bitsandbytes-int8", "bitsandbytes-nf4", "torchao-int8"])
def test_tags_warmed_up_in_bf16_answer_on_a_quantised_backbone_nearly_as_there(
    form: str, checkpoints: Path, tmp_path: Path
) -> None:
    place = checkpoint(checkpoints, "llama")
    warmed = warm_up(tmp_path / "run", load(place, "none", "bf16"))
    moved = MarkupModel.from_tags(warmed.folder, load(place, form, "bf16"))
    assert moved.table is not None and warmed.model.table is not None
    assert torch.equal(moved.table.rows, warmed.model.table.rows)
    texts = ["my card is gone", "is it cold outside", "when do you close"]
    labels = ["lost card", "weather", "opening hours"]
    there = warmed.model.classify(texts, labels, DEMOS)
    for one, other in zip(there, moved.classify(texts, labels, DEMOS), strict=True):
        for label in labels:
            assert other.probabilities[label] == pytest.approx(one.probabilities[label], abs=0.25)


@pytest.mark.parametrize("form", ["none", *FORMS])
def test_another_model_is_refused_however_it_is_quantised(form: str, checkpoints: Path, tmp_path: Path) -> None:
    place = checkpoint(checkpoints, "llama")
    quantised = load(place, form, "bf16")

    def changed(name: str, change: object) -> Backbone:
        backbone = load(place)
        with torch.no_grad():
            change(backbone)  # type: ignore[operator]
        backbone.model.save_pretrained(tmp_path / name)
        backbone.tokenizer.save_pretrained(tmp_path / name)
        return load(tmp_path / name)

    def other_layers(backbone: Backbone) -> None:  # of the same norms
        for _, module, _ in linear_layers(backbone.model):
            module.weight.copy_(module.weight.flip(0))

    def other_embedding(backbone: Backbone) -> None:
        backbone.embedding.weight[7, 3] += 0.01

    def tuned(backbone: Backbone) -> None:  # a tenth of what another model differs by
        for _, module, _ in linear_layers(backbone.model):
            module.weight.add_(0.15 * module.weight.std() * torch.randn_like(module.weight))

    torch.manual_seed(0)
    assert difference(quantised, load(place)) is None
    assert "linear layers" in str(difference(quantised, changed("layers", other_layers)))
    assert "embedding table" in str(difference(quantised, changed("embedding", other_embedding)))
    found = difference(quantised, changed("tuned", tuned))
    assert bool(found) == (form == "none" or "int8" in form), "4-bit rounding hides changes of that size"


@pytest.mark.parametrize("form", ["bitsandbytes-int8", "bitsandbytes-nf4"])
def test_layers_with_transposed_weights_are_recognised(form: str, tmp_path: Path) -> None:
    place = gpt2(tmp_path / "gpt2")
    assert difference(load(place), load(place, form)) is None


def test_a_fingerprint_of_an_earlier_version_is_refused_with_the_remedy(checkpoints: Path, tmp_path: Path) -> None:
    place = checkpoint(checkpoints, "bert")
    MarkupModel(load(place), "markup_letters").save(tmp_path / "tags")
    path = tmp_path / "tags" / "tags.json"
    details = json.loads(path.read_text())
    del details["backbone"]["quantisation"], details["sha256"]
    for name in ("quantisation", "embedding_bf16_sha256", "linear_sketch", "linear_norms"):
        del details["fingerprint"][name]
    path.write_text(json.dumps(details))
    again = MarkupModel.from_tags(tmp_path / "tags", load(place, "none", "bf16"))
    with pytest.raises(TagFileError, match=r"earlier version .*save them again"):
        MarkupModel.from_tags(tmp_path / "tags", load(place, LIBRARY))
    again.save(tmp_path / "tags")
    MarkupModel.from_tags(tmp_path / "tags", load(place, LIBRARY))


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_prefix_gives_the_answers_of_whole_prompts(form: str, checkpoints: Path) -> None:
    backbone = load(checkpoint(checkpoints, "llama"), form)
    assert backbone.exactness.limit > 0, backbone.exactness.obstacle
    texts = [text for texts in TEXTS.values() for text in texts]
    cached = MarkupModel(backbone, "markup_letters", seed=1)
    first = cached.classify(texts, LABELS, DEMOS)
    later = cached.classify(texts, LABELS, DEMOS)
    backbone.__dict__["exactness"] = backbone.exactness._replace(limit=0)
    whole = MarkupModel(backbone, "markup_letters", seed=1).classify(texts, LABELS, DEMOS)
    rounds_inputs = form in ("bitsandbytes-int8", "torchao-int4")
    for found in (first, later):
        for one, other in zip(found, whole, strict=True):
            for name, value in one.probabilities.items():
                assert value == pytest.approx(other.probabilities[name], abs=0.02 if rounds_inputs else 1e-3)


def test_a_classifier_keeps_how_its_backbone_is_quantised(checkpoints: Path, tmp_path: Path) -> None:
    needs(LIBRARY)
    place = checkpoint(checkpoints, "bert")
    MarkupModel(load(place), "markup_letters").save(tmp_path / "tags")
    classifier = MarkupClassifier(tmp_path / "tags", quantisation=LIBRARY, device="cpu", retriever="bm25")
    classifier.fit([text for text, _ in DEMOS], [label for _, label in DEMOS])
    assert classifier.fitted_model().backbone.quantisation == LIBRARY
    classifier.save(tmp_path / "classifier")
    loaded = MarkupClassifier.load(tmp_path / "classifier", device="cpu")
    assert loaded.fitted_model().backbone.quantisation == LIBRARY
    assert loaded.predict_proba(["is it cold"]).tolist() == classifier.predict_proba(["is it cold"]).tolist()
    whole = MarkupClassifier.load(tmp_path / "classifier", device="cpu", quantisation="none")
    assert whole.fitted_model().backbone.quantisation == "none"


def test_commands_take_it_and_tags_bring_it_along(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(LIBRARY)
    place = str(checkpoint(checkpoints, "bert"))
    tags = tmp_path / "tags"
    MarkupModel(Backbone.load(BackboneConfig(place, device="cpu", quantisation=LIBRARY)), "markup_letters").save(tags)
    ask = ["predict", "--labels", *LABELS, "--device", "cpu"]
    answers = {}
    for name, more in {
        "tags": ["--tags", str(tags)],
        "told": ["--backbone", place, "--quantisation", LIBRARY],
        "unquantised": ["--tags", str(tags), "--quantisation", "none"],
    }.items():
        assert main([*ask, *more, "--", "where is it"]) == 0
        answers[name] = json.loads(capsys.readouterr().out)
    assert answers["tags"] == answers["told"] != answers["unquantised"]
    assert main(["tags", str(tags)]) == 0
    assert LIBRARY in capsys.readouterr().out
    assert main(["show", "--backbone", place, "--quantisation", LIBRARY, "--labels", *LABELS, "--", "hi"]) == 0
    capsys.readouterr()
    rows = "\n".join(f"{text},{label}" for text, label in DEMOS)
    (tmp_path / "examples.csv").write_text(f"text,label\n{rows}\n")
    out = str(tmp_path / "classifier")
    fit = ["fit", str(tmp_path / "examples.csv"), "--out", out, "--device", "cpu", "--quantisation", LIBRARY]
    assert main([*fit, "--backbone", place]) == 0
    assert json.loads((tmp_path / "classifier" / "classifier.json").read_text())["backbone"]["quantisation"] == LIBRARY
    capsys.readouterr()
    assert main(["predict", "--classifier", out, "--device", "cpu", "--quantisation", "none", "--", "hi"]) == 0


def test_a_file_of_an_unquantised_backbone_shares_it_with_whoever_asks_by_name() -> None:
    saved = {"name": "model", "revision": None}
    for form in ("none", "gptq"):
        assert config_of({**saved, "quantisation": form}) == config_of(saved) == BackboneConfig("model")
    assert config_of({**saved, "quantisation": LIBRARY}).quantisation == LIBRARY
    assert config_of({**saved, "quantisation": LIBRARY}, quantisation="none").quantisation == "none"


def test_a_fingerprint_survives_json(checkpoints: Path) -> None:
    found = Fingerprint.of(load(checkpoint(checkpoints, "bert"), LIBRARY))
    assert found.quantisation == LIBRARY
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert replace(found, linear_sketch=tuple(-v for v in found.linear_sketch), weights_sha256="").difference(found)
