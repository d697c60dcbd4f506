"""What options get without evidence is found in the model's own prompts, and divided out: for names as for letters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from icl_markup import warmup as warmup_module
from icl_markup.classifier import MarkupClassifier
from icl_markup.cli import main
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.model import MarkupModel
from icl_markup.predict import ask_model
from icl_markup.priors import CONTENT_FREE, log_probs_of, without_prior
from icl_markup.tasks import NONE_OF_THE_ABOVE
from icl_markup.warmup import run_warmup
from icl_markup.warmup_config import OptimiserConfig, WarmupConfig
from tests.conftest import stand_in, tiny_backbone, tiny_task

OPTIONS = (Option("lost card"), Option("opening hours"), Option("complaint"))
DEMOS = (Demo("I lost my card", 0), Demo("when do you open", 1))
EPISODE = Episode(OPTIONS, DEMOS, (Query("this is awful"), Query("where is my card")))
TOKENS = 2048


@pytest.fixture(params=[("llama", "names"), ("llama", "symbols"), ("t5", "names"), ("bert", "names")], ids=str)
def model(request: pytest.FixtureRequest) -> MarkupModel:
    """Models of several kinds, answering in words or with letters."""
    kind, answers = request.param
    return MarkupModel(tiny_backbone(kind), answers=answers)


def answers_to(model: MarkupModel, episode: Episode, prior: str) -> np.ndarray:
    """Log-probabilities of an episode's queries."""
    return log_probs_of(model, [episode], prior, TOKENS)[0].log_probs  # type: ignore[arg-type]


def test_texts_without_content_favor_nothing_in_the_mean(model: MarkupModel) -> None:
    probes = replace(EPISODE, queries=tuple(Query(text) for text in CONTENT_FREE))
    raw = np.exp(answers_to(model, probes, "none"))
    wanted = raw / raw.mean(axis=0)
    found = np.exp(answers_to(model, probes, "contextual"))
    assert found == pytest.approx(wanted / wanted.sum(axis=1, keepdims=True), abs=1e-5)


def test_the_unconditional_prior_does_not_depend_on_what_a_prompt_shows(model: MarkupModel) -> None:
    shown = answers_to(model, EPISODE, "none") - answers_to(model, EPISODE, "unconditional")
    without = replace(EPISODE, demos=())
    alone = answers_to(model, without, "none") - answers_to(model, without, "unconditional")
    # Both differ from what was taken off by a constant a query, which makes probabilities add up to one.
    assert shown - shown[:, :1] == pytest.approx(alone - alone[:, :1], abs=1e-4)
    assert np.abs(shown - shown[:, :1]).max() > 1e-4


def test_a_prompt_may_leave_its_options_out(model: MarkupModel) -> None:
    bare = replace(EPISODE, demos=(), queries=EPISODE.queries[:1], shows_options=False)
    prompt = model.markup.compose(bare)
    assert len(prompt.ids) < len(model.markup.compose(replace(bare, shows_options=True)).ids)
    assert not any(piece.segment > 0 for piece in prompt.pieces)


@pytest.mark.parametrize("prior", ["contextual", "domain", "unconditional"])
def test_none_of_the_above_keeps_its_odds(prior: str, model: MarkupModel) -> None:
    episode = replace(EPISODE, options=(*OPTIONS, Option(NONE_OF_THE_ABOVE)))
    found = answers_to(model, episode, prior)
    assert np.exp(found).sum(axis=1) == pytest.approx(1)
    sample = np.log([[0.7, 0.1, 0.2]])
    changed = without_prior(np.log([[0.5, 0.3, 0.2]]), sample, ["a", "b", NONE_OF_THE_ABOVE])
    # The labels' prior is 7 to 1 about its mean; what fits nothing is not touched by it.
    assert np.exp(changed[0, 0] - changed[0, 1]) == pytest.approx((0.5 / 0.3) / 7)
    assert np.exp(changed[0, 2] - changed[0, 1]) == pytest.approx((0.2 / 0.3) * (2 * 0.1 / 0.8))


@pytest.mark.parametrize("prior", ["contextual", "domain", "unconditional"])
def test_models_predictions_and_classifiers_divide_out_the_same(prior: str) -> None:
    model = MarkupModel(tiny_backbone("llama"))
    labels = [option.name for option in OPTIONS]
    demos = [(demo.text, labels[demo.answer]) for demo in DEMOS]
    wanted = np.exp(answers_to(model, EPISODE, prior))
    texts = [query.text for query in EPISODE.queries]
    classified = model.classify(texts, labels, demos, calibration=prior)  # type: ignore[arg-type]
    assert np.array([list(one.probabilities.values()) for one in classified]) == pytest.approx(wanted, abs=1e-6)
    asked = ask_model(model, replace(EPISODE, queries=()), TOKENS, calibration=prior)(texts)  # type: ignore[arg-type]
    assert np.array([list(one["probabilities"].values()) for one in asked]) == pytest.approx(wanted, abs=1e-6)
    classifier = MarkupClassifier(model, calibration=prior)  # type: ignore[arg-type]
    classifier.fit([*[text for text, _ in demos], "bad service"], [*[label for _, label in demos], "complaint"])
    plain = MarkupClassifier(model, calibration="none").fit(
        classifier.texts_, [classifier.labels()[i] for i in classifier.labels_]
    )
    assert classifier.predict_proba(texts).sum(axis=1) == pytest.approx(1)
    assert np.abs(classifier.predict_proba(texts) - plain.predict_proba(texts)).max() > 1e-6


def test_the_command_divides_out_what_is_asked(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MarkupModel(stand_in()).save(f"{tmp_path}/tags")
    monkeypatch.setattr("icl_markup.tagfile.Backbone.load", staticmethod(lambda _config: stand_in()))
    given = ["predict", "--tags", str(folder), "--labels", "lost card", "opening hours"]
    found = []
    for prior in ("none", "contextual", "unconditional", "auto"):
        more = ["--calibration", prior]
        assert main([*given, *more, "--", "where is my card"]) == 0
        found.append(json.loads(capsys.readouterr().out)["probabilities"]["lost card"])
    assert len(set(found[:3])) == 3
    assert found[3] == found[1], "names are calibrated by default"


@pytest.mark.parametrize(("kind", "prior"), [("llama", "contextual"), ("bert", "none")])
def test_names_are_calibrated_by_default_and_symbols_are_not(kind: str, prior: str) -> None:
    model = MarkupModel(tiny_backbone(kind))
    assert model.prior == prior
    assert model.predictions(EPISODE) == model.predictions(EPISODE, calibration=prior)  # type: ignore[arg-type]


def test_a_warm_up_chooses_by_its_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for better in ("none", "contextual"):

        def told(self: object, prior: str, better: str = better) -> tuple[list[float], list[float]]:
            return ([0.9] if prior == better else [0.5]), [1.0]

        with monkeypatch.context() as patch:
            patch.setattr(warmup_module._Warmup, "_validated", told)
            plan = OptimiserConfig(steps=1, batch_tokens=400, window=4)
            config = WarmupConfig(tasks=[], output=str(tmp_path / better), optimiser=plan)
            given = {"tasks": [tiny_task()], "validation_tasks": [tiny_task("v")], "backbone": tiny_backbone("llama")}
            model = run_warmup(config, **given, progress=False).model  # type: ignore[arg-type]
        assert model.prior == better
        assert MarkupModel.from_tags(tmp_path / better / "tags", tiny_backbone("llama")).prior == better
