"""MetaICL: a copy is trained on the tags' episodes; the backbone stays, runs repeat, and what is saved is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icl_markup import evaluation
from icl_markup import metaicl as metaicl_module
from icl_markup.answers import default_answers, default_wording
from icl_markup.backbone import Backbone
from icl_markup.config import load_config
from icl_markup.episodes import Episode, EpisodeConfig, EpisodeSampler
from icl_markup.errors import BackboneError, ConfigError, WarmupError
from icl_markup.loading import BackboneConfig, checkpoint_gradients
from icl_markup.metaicl import MetaIclConfig, MetaIclResult, load_metaicl, run_metaicl
from icl_markup.metaicl_model import Trainee
from icl_markup.model import MarkupModel
from icl_markup.tasks import Example, HeldExamples, Task
from icl_markup.warmup import OptimiserConfig, ValidationConfig, WarmupConfig, run_warmup
from tests.conftest import KINDS, tiny_backbone, tiny_task

METHODS = ("lora", "full_finetuning")
EPISODES = EpisodeConfig(n_way=(2, 3), k_shot=(0, 1), none_option=0.3, out_of_scope=0.5)
PLAN = OptimiserConfig(steps=4, warmup_steps=1, batch_tokens=600, window=8)
VALIDATION = ValidationConfig(every=2, episodes=4, n_way=2)
CONFIG = MetaIclConfig(
    tasks=[], learning_rate=1e-2, episodes=EPISODES, optimiser=PLAN, validation=VALIDATION, save_every=1
)


def train(
    folder: Path, kind: str = "bert", *, backbone: Backbone | None = None, validated: bool = False, **changes: Any
) -> MetaIclResult:
    """Train on two tiny tasks; where nothing validates, the last weights are kept, which are never the first."""
    return run_metaicl(
        replace(CONFIG, output=str(folder), **changes),
        tasks=[tiny_task("one"), tiny_task("two")],
        validation_tasks=[tiny_task("validation")] if validated else [],
        backbone=backbone or tiny_backbone(kind),
        progress=False,
    )


def answers(model: MarkupModel) -> torch.Tensor:
    """Scores of the queries of some episodes."""
    sampler = EpisodeSampler([tiny_task()], EpisodeConfig(n_way=(3, 3), k_shot=(1, 1)), seed=3)
    found = model.scores([sampler.episode(0, i) for i in range(4)])
    return torch.stack([query.scores for episode in found for query in episode])


def plain(backbone: Backbone) -> torch.Tensor:
    return answers(MarkupModel(backbone, default_wording(default_answers(backbone.kind, backbone.parameters))))


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_words_where_tags_answer_in_words(kind: str, tmp_path: Path) -> None:
    trained = train(tmp_path, kind, method="lora").model
    assert trained.answers == MarkupModel(tiny_backbone(kind)).answers
    assert trained.template.name == (default_wording(trained.answers))


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_stays_bit_identical_while_its_copy_learns(
    backbone: Backbone, method: str, tmp_path: Path
) -> None:
    before, checksum = plain(backbone), backbone.checksum()
    result = train(tmp_path, backbone=backbone, method=method)
    assert backbone.checksum() == checksum
    for model in (backbone.model, result.model.backbone.model):
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert torch.equal(plain(backbone), before)
    assert not torch.allclose(answers(result.model), before, atol=1e-4)
    shared = {p.data_ptr() for p in backbone.model.parameters()}
    assert not shared & {p.data_ptr() for p in result.model.backbone.model.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_answers_as_the_backbone_does_before_it_is_trained(backbone: Backbone, method: str) -> None:
    trainee = Trainee.of(backbone, replace(CONFIG, method=method))
    # Where every weight is trained, the normalizer of a name is computed with its gradient: equal to rounding.
    assert torch.allclose(plain(trainee.backbone), plain(backbone), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_equals_what_was_trained_to_the_bit(backbone: Backbone, method: str, tmp_path: Path) -> None:
    result = train(tmp_path, backbone=backbone, method=method)
    model, parameters = load_metaicl(result.folder, backbone)
    assert parameters == result.parameters
    assert model.template.source == result.model.template.source
    assert torch.equal(answers(model), answers(result.model))
    trained = dict(result.model.backbone.model.named_parameters())
    loaded = dict(model.backbone.model.named_parameters())
    assert set(loaded) == set(trained)
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert {path.suffix for path in result.folder.iterdir()} == {".json", ".safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl", "model"}


def test_the_backbone_is_found_by_its_name_and_no_file_tells_where_it_lies(tmp_path: Path) -> None:
    source = tiny_backbone("bert")
    source.model.save_pretrained(tmp_path / "source")
    source.tokenizer.save_pretrained(tmp_path / "source")
    backbone = Backbone.load(BackboneConfig(str(tmp_path / "source"), device="cpu", precision="none"))
    for method in METHODS:
        result = train(tmp_path / method, backbone=backbone, method=method)
        model, _ = load_metaicl(result.folder)
        assert torch.allclose(answers(model).cpu(), answers(result.model), atol=0.05)
    backbone.name = "named"
    for method in METHODS:
        result = train(tmp_path / "named" / method, backbone=backbone, method=method)
        files = [path.read_text() for path in result.folder.glob("*.json")]
        assert not any("source" in text.replace('"source"', "") for text in files)


def test_a_model_trained_in_full_is_an_ordinary_backbone(tmp_path: Path) -> None:
    result = train(tmp_path, "bert", method="full_finetuning")
    loaded = Backbone.load(BackboneConfig(str(result.folder), precision="none", device="cpu"))
    assert torch.allclose(plain(loaded), answers(result.model), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_counted_and_moves_in_full_finetuning(kind: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(kind)
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    result = train(tmp_path, backbone=backbone, method="full_finetuning")
    assert result.parameters == sum(p.numel() for p in before.values()) == result.summary["trained parameters"]
    after = dict(result.model.backbone.model.named_parameters())
    assert not {name for name, value in before.items() if torch.equal(after[name], value)}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_rank_times_inputs_and_outputs_and_nothing_else_moves(kind: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(kind)
    head = backbone.model.get_output_embeddings()
    linear = {n: m for n, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    result = train(tmp_path, backbone=backbone, lora_rank=3)
    assert result.parameters == sum(3 * (m.in_features + m.out_features) for m in linear.values())
    assert result.parameters == sum(v.numel() for v in load_file(result.folder / "adapter_model.safetensors").values())
    base = backbone.model.state_dict()
    for name, value in result.model.backbone.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name
    queries = train(tmp_path / "queries", backbone=backbone, lora_rank=3, lora_targets=["q_proj", "q", "query"])
    assert 0 < queries.parameters < result.parameters


def cut_short(monkeypatch: pytest.MonkeyPatch, after: int, folder: Path, kind: str = "bert", **settings: Any) -> None:
    """Train, and be interrupted in the step after `after` of them."""
    step = metaicl_module._Run._step

    def die(self: Any, *args: Any) -> Any:
        if self.progress.step == after:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metaicl_module._Run, "_step", die)
        train(folder, kind, **settings)


@pytest.mark.parametrize(("kind", "method"), [("llama", "lora"), ("t5", "full_finetuning"), ("bert", "lora")])
def test_a_run_that_was_cut_short_continues_to_the_bit(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, steps=6, batches_per_step=2)
    settings: dict[str, Any] = {"method": method, "optimiser": plan, "save_every": 2, "validated": True}
    whole = train(tmp_path / "whole", kind, **settings)
    cut_short(monkeypatch, 5, tmp_path / "cut", kind, **settings)  # the last checkpoint is of step 4
    assert not (tmp_path / "cut" / "model").exists()
    step, taken = metaicl_module._Run._step, []

    def spy(self: Any, *args: Any) -> Any:
        taken.append(self.progress.step)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(metaicl_module._Run, "_step", spy)
        resumed = train(tmp_path / "cut", kind, **settings)
    assert taken == [4, 5]
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for name in ("adapter_model.safetensors",) if method == "lora" else ("model.safetensors",):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert resumed.summary == whole.summary


def test_a_finished_run_is_loaded_and_another_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tmp_path, validated=True)

    def never(*_args: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(metaicl_module._Run, "_step", never)
    again = train(tmp_path, validated=True)
    assert torch.equal(answers(again.model), answers(first.model))
    assert (again.parameters, again.summary, again.folder) == (first.parameters, first.summary, first.folder)
    with pytest.raises(WarmupError, match=r"another seed \(0\)"):
        train(tmp_path, validated=True, seed=1)
    with pytest.raises(WarmupError, match="another content of its tasks"):
        train(tmp_path)
    with pytest.raises(WarmupError, match="another backbone"):
        train(tmp_path, "roberta", validated=True)


def test_the_hash_of_tasks_is_that_of_one_list_of_all_they_hold() -> None:
    strange = Task(
        'quo"ted',
        ("é", "b"),
        {"train": HeldExamples([Example("\n\u2028", "é")]), "a": HeldExamples([])},
        {"é": "an é"},
        "what",
        "what",
    )
    tasks = [tiny_task("one"), strange, tiny_task("one")]
    told = [
        [
            task.name,
            task.labels,
            sorted((split, [(e.text, e.label) for e in examples]) for split, examples in task.splits.items()),
            sorted(task.descriptions.items()),
            task.description,
            task.oos_label,
        ]
        for task in tasks
    ]
    for some in (told, told[:1], []):
        whole = hashlib.sha256(json.dumps(some).encode()).hexdigest()
        assert metaicl_module._data_hash(tasks[: len(some)]) == whole


def test_an_unfinished_run_is_not_continued_with_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(monkeypatch, 2, tmp_path)
    with pytest.raises(WarmupError, match="another method"):
        train(tmp_path, method="full_finetuning")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WarmupError, match="damaged checkpoint"):
        train(tmp_path)


def test_a_changed_backbone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("bert")
    step = metaicl_module._Run._step

    def meddle(self: Any, *args: Any) -> Any:
        with torch.no_grad():
            next(backbone.model.parameters())[0, 0] += 1e-7
        return step(self, *args)

    monkeypatch.setattr(metaicl_module._Run, "_step", meddle)
    with pytest.raises(WarmupError, match="the weights of the backbone that was given changed"):
        train(tmp_path, backbone=backbone)
    assert not (tmp_path / "model").exists()


def recorded(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[Any, Episode], list[Any]]:
    """Return the episodes that a run draws for training, by place, and the ones it validates on."""
    drawn: dict[Any, Episode] = {}
    validated: list[Any] = []
    draw, answer = EpisodeSampler.episode, evaluation.answer_queries

    def episode(self: EpisodeSampler, step: int, position: int) -> Episode:
        found = draw(self, step, position)
        if len(self._pools) > 1:
            drawn[step, position] = found
        return found

    def answer_queries(model: MarkupModel, episodes: Any, *args: Any) -> Any:
        validated.append(list(episodes))
        return answer(model, episodes, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeSampler, "episode", episode)
        for module in (evaluation, metaicl_module):
            patch.setattr(module, "answer_queries", answer_queries)
        run()
    return drawn, validated


def test_the_episodes_are_those_of_a_warm_up_of_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmup = WarmupConfig(
        tasks=[], output=str(tmp_path / "tags"), episodes=EPISODES, optimiser=replace(PLAN, learning_rate=0.2),
        validation=VALIDATION, seed=11,
    )  # fmt: skip
    data: dict[str, Any] = {
        "tasks": [tiny_task("one"), tiny_task("two")], "validation_tasks": [tiny_task("v"), tiny_task("w")],
        "backbone": tiny_backbone("bert"), "progress": False,
    }  # fmt: skip
    config = MetaIclConfig.like(warmup, output=str(tmp_path / "lora"), method="lora")
    of_tags = recorded(lambda: run_warmup(warmup, **data), monkeypatch)
    of_lora = recorded(lambda: run_metaicl(config, **data), monkeypatch)
    common = of_tags[0].keys() & of_lora[0].keys()
    assert {(0, position) for position in range(8)} <= common
    assert all(of_tags[0][place] == of_lora[0][place] for place in common)
    assert len(of_lora[1]) == 2 * 3
    assert of_tags[1][:6] == of_lora[1]
    assert [len(episodes) for episodes in of_tags[1][6:]] == [4, 4], "and once more with calibration"
    rates = [
        [row["learning_rate"] for row in map(json.loads, (tmp_path / run / "metrics.jsonl").open()) if "loss" in row]
        for run in ("tags", "lora")
    ]
    shapes = [[rate / max(run) for rate in run] for run in rates]
    assert shapes[0] == pytest.approx(shapes[1])
    assert max(rates[1]) == pytest.approx(1e-3)


@pytest.mark.parametrize(("method", "kind", "rate"), [("lora", "llama", 5e-2), ("full_finetuning", "bert", 1e-2)])
def test_the_loss_falls_on_a_planted_regularity(method: str, kind: str, rate: float, tmp_path: Path) -> None:
    always_none = EpisodeConfig(n_way=(2, 2), k_shot=(0, 0), none_option=1.0, out_of_scope=1.0)
    plan = OptimiserConfig(steps=16, warmup_steps=1, batch_tokens=400, window=16)
    letters = "plain_letters_text_label"
    train(tmp_path, kind, method=method, learning_rate=rate, episodes=always_none, optimiser=plan, template=letters)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 0.9
    assert rows[-1]["loss"] < 0.6  # the random head's rows are short: with LoRA it stays, and bounds the logits
    assert rows[-1]["accuracy"] == 1


def test_the_best_step_is_kept_even_if_it_is_the_first(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    config = replace(CONFIG, learning_rate=1e-2)
    accuracies = iter([0.9, 0.5, 0.1])
    original = metaicl_module.answer_queries

    def worse(*args: Any) -> Any:
        found = original(*args)
        found.correct[:] = False
        count = round(next(accuracies) * len(found.correct))
        found.correct[:count] = True
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metaicl_module, "answer_queries", worse)
        result = train(tmp_path, backbone=backbone, validated=True, learning_rate=config.learning_rate)
    assert result.summary["best step"] == 0
    assert result.summary["steps"] == 4
    assert torch.equal(answers(result.model), plain(backbone))


def test_no_further_steps_after_the_patience_ran_out(tmp_path: Path) -> None:
    patience = ValidationConfig(every=1, episodes=4, n_way=2, patience=2)
    plan = replace(PLAN, steps=30)
    result = train(tmp_path, validated=True, learning_rate=1e-9, validation=patience, optimiser=plan)
    assert result.summary["best step"] < result.summary["steps"] < 30


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_lower_precision_are_trained_in_fp32_under_autocast(method: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    backbone.model.bfloat16()
    checksum = backbone.checksum()
    result = train(tmp_path, backbone=backbone, method=method)
    assert {p.dtype for p in result.model.backbone.model.parameters()} == {torch.float32}
    assert result.summary["precision"] == "bf16"
    assert backbone.checksum() == checksum
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    assert torch.equal(answers(load_metaicl(result.folder, backbone)[0]), answers(result.model))


def test_activations_are_recomputed_where_the_backbone_does_so(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    usual = train(tmp_path / "usual", backbone=backbone)
    checkpoint_gradients(backbone.model)
    result = train(tmp_path / "less", backbone=backbone)
    assert result.model.backbone.model.training
    assert torch.allclose(answers(result.model), answers(usual.model), atol=1e-5)


def test_whole_names_can_be_trained(tmp_path: Path) -> None:
    result = train(tmp_path, "llama", answers="names", optimiser=replace(PLAN, steps=2))
    assert load_metaicl(result.folder, tiny_backbone("llama"))[0].answers == "names"


def test_a_damaged_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    result = train(tmp_path, backbone=backbone)
    with pytest.raises(BackboneError, match="was trained from 'tiny-bert', not from 'tiny-roberta'"):
        load_metaicl(result.folder, tiny_backbone("roberta"))
    with pytest.raises(BackboneError, match="is this a folder of run_metaicl"):
        load_metaicl(tmp_path, backbone)
    details = (result.folder / "metaicl.json").read_text()
    weights = result.folder / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(BackboneError, match="SHA-256"):
        load_metaicl(result.folder, backbone)
    weights.write_bytes(raw)
    for broken in (details[:-20], "[]", details.replace('"format": 1', '"format": 2'), '{"format": 1}'):
        (result.folder / "metaicl.json").write_text(broken)
        with pytest.raises(BackboneError, match="damaged"):
            load_metaicl(result.folder, backbone)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = MarkupModel.loss_terms

    def poisoned(self: MarkupModel, *args: Any, **kwargs: Any) -> Any:
        found = terms(self, *args, **kwargs)
        return replace(found, scores=found.scores * float("nan"))

    monkeypatch.setattr(MarkupModel, "loss_terms", poisoned)
    with pytest.raises(WarmupError, match="loss became nan at step 1; lower learning_rate"):
        train(tmp_path)
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WarmupError, match="take one in plain words"):
        train(tmp_path, template="markup_letters")
    with pytest.raises(ConfigError, match=r"lora_targets: .*not_a_layer"):
        train(tmp_path, lora_targets=["not_a_layer"])
    with pytest.raises(ConfigError, match="the output head"):
        train(tmp_path, lora_targets=["query", "decoder"])
    with pytest.raises(ConfigError, match="the embedding"):
        train(tmp_path, lora_targets=["word_embeddings"])
    backbone = tiny_backbone("bert")
    backbone.model.is_quantized = True
    with pytest.raises(BackboneError, match="quantised"):
        train(tmp_path, backbone=backbone, method="full_finetuning")
    (tmp_path / "file").write_text("")
    with pytest.raises(WarmupError, match="cannot be written"):
        train(tmp_path / "file")


def test_configurations_are_checked() -> None:
    assert load_config(MetaIclConfig, None, ["--tasks", "[]", "--method", "full_finetuning"]).peak_rate == 5e-5
    assert MetaIclConfig(tasks=[]).peak_rate == 1e-3
    assert MetaIclConfig(tasks=[], learning_rate=0.5).peak_rate == 0.5
    for changes in ({"learning_rate": 0.0}, {"lora_rank": 0}, {"weight_decay": -0.1}, {"lora_targets": []}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            MetaIclConfig(tasks=[], **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"optimiser\.learning_rate.*set learning_rate"):
        MetaIclConfig(tasks=[], optimiser=OptimiserConfig(learning_rate=1e-4))
