"""Methods that compose prompts: calibration does what its papers say, retrieval shows what is near."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.experiment_config import RetrievalConfig
from icl_markup.method import EpisodeScores
from icl_markup.model import MarkupModel
from icl_markup.priors import CONTENT_FREE
from icl_markup.prompted import Calibration, Probed, Prompted, out_of_scope
from icl_markup.retrieval import Retrieved
from icl_markup.tasks import NONE_OF_THE_ABOVE
from tests.conftest import TEXTS, tiny_backbone


@pytest.fixture(scope="module")
def model() -> MarkupModel:
    return MarkupModel(tiny_backbone("bert"), "plain_letters_text_label")


def episode(labels: int = 3, open_world: bool = False) -> Episode:
    names = list(TEXTS)[:labels]
    options = [Option(name) for name in names] + ([Option(NONE_OF_THE_ABOVE)] if open_world else [])
    demos = [Demo(TEXTS[name][0], i) for i, name in enumerate(names)]
    queries = [Query(TEXTS[name][1], i) for i, name in enumerate(names)]
    return Episode(tuple(options), tuple(demos), tuple(queries), "tiny")


def test_scores_are_the_models_own(model: MarkupModel) -> None:
    (found,) = Prompted(Probed(model)).scores([episode()])
    expected = [p.probabilities for p in model.predictions(episode())]
    assert found.log_probs.shape == (3, 3)
    assert softmax(found.log_probs, axis=1) == pytest.approx(np.array([list(p.values()) for p in expected]), abs=1e-5)


def test_contextual_calibration_makes_content_free_texts_uniform(model: MarkupModel) -> None:
    probes = replace(episode(), queries=tuple(Query(text, 0) for text in CONTENT_FREE))
    (found,) = Prompted(Probed(model), "contextual").scores([probes])
    mean = softmax(Prompted(Probed(model)).scores([probes])[0].log_probs, axis=1).mean(axis=0)
    raw = softmax(Prompted(Probed(model)).scores([probes])[0].log_probs, axis=1) / mean
    assert softmax(found.log_probs, axis=1) == pytest.approx(raw / raw.sum(axis=1, keepdims=True), abs=1e-5)


def test_batch_calibration_divides_by_the_mean_over_the_queries(model: MarkupModel) -> None:
    (raw,) = Prompted(Probed(model)).scores([episode()])
    (found,) = Prompted(Probed(model), "batch").scores([episode()])
    prior = logsumexp(raw.log_probs, axis=0) - np.log(3)
    expected = raw.log_probs - prior
    assert found.log_probs == pytest.approx(expected - logsumexp(expected, axis=1, keepdims=True), abs=1e-5)


def test_calibrations_of_one_model_are_asked_for_together(model: MarkupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Calibration] = ["none", "contextual", "domain", "unconditional", "batch"]
    alone = [Prompted(Probed(model), kind).scores([episode(), episode(2)]) for kind in kinds]
    calls = []
    scores = type(model).scores

    def counting(self: MarkupModel, episodes: Sequence[Episode], batch_tokens: int) -> object:
        calls.append(episodes)
        return scores(self, episodes, batch_tokens)

    monkeypatch.setattr(type(model), "scores", counting)
    one = Probed(model)
    methods = [Prompted(one, kind) for kind in kinds]
    one.priors.update(method.prior for method in methods)
    for method, wanted in zip(methods, alone, strict=True):
        for a, b in zip(method.scores([episode(), episode(2)]), wanted, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-5)
    assert len(calls) == 1
    methods[0].scores([episode(2)])
    methods[1].scores([episode(), episode(2)])
    assert len(calls) == 2, "answers to two lists of episodes are kept"
    one.priors.clear()
    methods[0].scores([episode(3, open_world=True)])
    assert len(calls[-1][0].queries) == 3, "no probes that nobody wants"


@pytest.mark.parametrize("kind", ["contextual", "domain", "unconditional", "batch"])
def test_calibration_is_deterministic_and_normalised(model: MarkupModel, kind: str) -> None:
    one, other = (Prompted(Probed(model), kind) for _ in range(2))  # type: ignore[arg-type]
    first, second = one.scores([episode(), episode(2)]), other.scores([episode(), episode(2)])
    for a, b in zip(first, second, strict=True):
        assert (a.log_probs == b.log_probs).all()
        assert np.exp(a.log_probs).sum(axis=1) == pytest.approx(1)


def test_without_demonstrations_they_have_no_influence(model: MarkupModel) -> None:
    method = Prompted(Probed(model), shows_demos=False)
    bare = replace(episode(), demos=())
    assert method.scores([episode()])[0].log_probs == pytest.approx(method.scores([bare])[0].log_probs)


def test_the_option_none_can_be_left_out(model: MarkupModel) -> None:
    opened = episode(open_world=True)
    opened = replace(opened, queries=(*opened.queries, Query("sing a song", 3)))
    (offered,) = Prompted(Probed(model)).scores([opened])
    (closed,) = Prompted(Probed(model), offers_none=False).scores([opened])
    assert np.isfinite(offered.log_probs).all()
    assert (closed.log_probs[:, -1] == -np.inf).all()
    assert closed.log_probs[:3, :3] == pytest.approx(Prompted(Probed(model)).scores([episode()])[0].log_probs, abs=1e-5)
    assert closed.out_of_scope == pytest.approx(-closed.log_probs.max(axis=1))
    p = softmax(offered.log_probs, axis=1)[:, -1]
    assert offered.out_of_scope == pytest.approx(np.log(p / (1 - p)), abs=1e-6)
    assert (out_of_scope(offered.log_probs, opened) == offered.out_of_scope).all()


class Recorder:
    """A method that notes the episodes it is given and prefers the first option."""

    def __init__(self) -> None:
        self.seen: list[Episode] = []

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        self.seen += episodes
        return [
            EpisodeScores(-np.arange(len(e.options), dtype=float)[None], np.zeros(len(e.queries))) for e in episodes
        ]


class Letters:
    """Embeds a text as the counts of its letters, of unit length."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
        return (counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)).astype(np.float32)

    def remember(self, texts: Iterable[str]) -> None:
        """There is nothing to keep."""

    def too_long(self, texts: Iterable[str]) -> int:
        return 0


def wide(open_world: bool = False) -> Episode:
    names = ["aaa", "bbb", "ccc", "ddd", "eee", "fff"]
    options = [Option(n) for n in names] + ([Option(NONE_OF_THE_ABOVE)] if open_world else [])
    demos = [Demo(f"{n}{extra}", i) for i, n in enumerate(names) for extra in ("x", "y")]
    return Episode(tuple(options), tuple(demos), (Query("dddc", 3), Query("aaab", 0)), "wide")


@pytest.mark.parametrize("open_world", [False, True])
def test_retrieval_shows_the_nearest_labels_and_demonstrations(open_world: bool) -> None:
    inner = Recorder()
    method = Retrieved(inner, Letters(), RetrievalConfig(options=2, demos=3))  # type: ignore[arg-type]
    (found,) = method.scores([wide(open_world)])
    shown = [[option.name for option in e.options] for e in inner.seen]
    none = [NONE_OF_THE_ABOVE] if open_world else []
    assert shown == [["ddd", "ccc", *none], ["aaa", "bbb", *none]]
    for one in inner.seen:
        assert len(one.demos) == 3
        assert {one.options[d.answer].name for d in one.demos} == {o.name for o in one.options[:2]}
        for demo in one.demos:
            assert demo.text[:3] == one.options[demo.answer].name
        assert one.demos[-1].answer == 0  # the most similar comes last
        assert one.queries[0].answer == 0
    finite = np.isfinite(found.log_probs)
    assert finite.sum(axis=1).tolist() == [2 + open_world] * 2
    assert found.log_probs.argmax(axis=1).tolist() == [3, 0]


@pytest.mark.parametrize("expert", ["similarity", "logreg"])
def test_the_prior_counts_labels_that_are_near(expert: Any) -> None:
    class Undecided(Recorder):
        def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
            return [EpisodeScores(np.full((1, len(e.options)), -1.0), np.zeros(1)) for e in episodes]

    config = RetrievalConfig(options=3, demos=3, prior=1.0, expert=expert)
    (found,) = Retrieved(Undecided(), Letters(), config).scores([wide()])  # type: ignore[arg-type]
    assert found.log_probs.argmax(axis=1).tolist() == [3, 0]
    assert np.exp(found.log_probs).sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("expert", ["similarity", "logreg"])
def test_in_an_open_world_the_prior_says_how_far_the_nearest_label_is(expert: Any) -> None:
    class Undecided(Recorder):
        def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
            return [EpisodeScores(np.full((1, len(e.options)), -1.0), np.zeros(1)) for e in episodes]

    asked = replace(wide(open_world=True), queries=(Query("aaa", 0), Query("aaazzz", 6), Query("zzz", 6)))
    config = RetrievalConfig(options=3, demos=3, prior=1.0, expert=expert)
    (found,) = Retrieved(Undecided(), Letters(), config).scores([asked])  # type: ignore[arg-type]
    near, between, far = found.out_of_scope
    assert near < between < far
    assert found.log_probs.argmax(axis=1).tolist() == [0, 0, 6]
    assert np.exp(found.log_probs).sum(axis=1) == pytest.approx(1)


def test_options_that_retrieval_left_out_do_not_stop_the_answer_from_being_counted_wrong() -> None:
    asked = replace(wide(), queries=(Query("aaaa", 5),))
    inner = Recorder()
    (found,) = Retrieved(inner, Letters(), RetrievalConfig(options=2, demos=2)).scores([asked])  # type: ignore[arg-type]
    assert inner.seen[0].queries[0].answer is None
    assert found.log_probs[0, 5] == -np.inf
