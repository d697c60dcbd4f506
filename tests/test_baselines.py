"""Rivals without a language model: properties that every one of them has, and each one's own arithmetic."""

from __future__ import annotations

import gc
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from scipy.special import log_softmax, logsumexp
from sklearn.linear_model import LogisticRegression

from icl_markup.baselines import (
    Chance,
    EmbeddingCentroid,
    EmbeddingKNN,
    EmbeddingLogReg,
    Majority,
    TfidfLogReg,
    logistic,
    name_text,
)
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import BackboneError, ConfigError, PromptError
from icl_markup.evaluation import draw_episodes
from icl_markup.method import EpisodeScores, Method
from icl_markup.retrieval import NearestLabel
from icl_markup.sentences import SentenceEncoder
from icl_markup.tasks import NONE_OF_THE_ABOVE
from tests.conftest import tiny_backbone, tiny_task

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: icl-markup[baselines]")

NONE = Option(NONE_OF_THE_ABOVE)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """A tiny encoder with random weights: equal texts have equal vectors, and that is all it knows."""
    backbone = tiny_backbone("bert")
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    transformers.BertModel(backbone.model.config).save_pretrained(path)
    backbone.tokenizer.save_pretrained(path)
    return SentenceEncoder(str(path), device="cpu")


def setfit(encoder: SentenceEncoder, **options: Any) -> Method:
    pytest.importorskip("setfit", reason="setfit is not installed: icl-markup[baselines]")
    from icl_markup.setfit_method import SetFit

    gc.freeze()  # the trainer collects garbage after every training, and would go through all of torch each time
    # Vectors of an encoder with random weights are nearly one: it takes large weights to tell them apart.
    return SetFit(encoder, **{"iterations": 1, "max_steps": 1, "batch_size": 4, "c": 1000, **options})


METHODS: dict[str, Callable[[SentenceEncoder], Method]] = {
    "majority": lambda encoder: Majority(),
    "centroid": EmbeddingCentroid,
    "knn": EmbeddingKNN,
    "logreg": EmbeddingLogReg,
    "logreg without names": lambda encoder: EmbeddingLogReg(encoder, names=False, out_of_scope="max_probability"),
    "tfidf": lambda encoder: TfidfLogReg(),
    "retrieval": NearestLabel,
    "setfit": setfit,
    "setfit without names": lambda encoder: setfit(encoder, names=False, out_of_scope="max_probability"),
}
# Retrieval takes the mean of a label's two nearest texts: with one text equal to the query it may not put it first.
LEARNERS = [name for name in METHODS if name not in ("majority", "retrieval")]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, encoder: SentenceEncoder) -> Method:
    """Every method that learns from demonstrations, and the majority."""
    return METHODS[request.param](encoder)


@cache
def real_episode(k_shot: int) -> Episode:
    """Four labels, two queries."""
    first, second = draw_episodes(tiny_task(), n_way=4, k_shot=k_shot, episodes=2, seed=3)
    answer = next(i for i, option in enumerate(first.options) if option == second.options[second.queries[0].answer])
    return replace(first, queries=(*first.queries, Query(second.queries[0].text, answer)))


def one(method: Method, episode: Episode) -> EpisodeScores:
    return method.scores([episode])[0]


def same(a: EpisodeScores, b: EpisodeScores) -> None:
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-4)
    np.testing.assert_allclose(a.out_of_scope, b.out_of_scope, atol=2e-5)


@pytest.mark.parametrize("k_shot", [0, 2])
def test_scores_are_log_probabilities(method: Method, k_shot: int) -> None:
    scores = one(method, real_episode(k_shot))
    assert scores.log_probs.shape == (2, 4)
    assert scores.log_probs.dtype == np.float64
    assert np.isfinite(scores.log_probs).all()
    assert np.isfinite(scores.out_of_scope).all()
    np.testing.assert_allclose(logsumexp(scores.log_probs, axis=1), 0, atol=1e-6)


def test_order_of_options_and_demos_does_not_matter(method: Method) -> None:
    episode = real_episode(2)
    expected = one(method, episode)
    order = list(range(4))
    rng = random.Random(5)
    rng.shuffle(order)
    demos = [Demo(demo.text, order.index(demo.answer)) for demo in episode.demos]
    rng.shuffle(demos)
    moved = replace(episode, options=tuple(episode.options[i] for i in order), demos=tuple(demos))
    found = one(method, moved)
    np.testing.assert_allclose(found.log_probs, expected.log_probs[:, order], atol=1e-9)
    np.testing.assert_allclose(found.out_of_scope, expected.out_of_scope, atol=1e-9)


def test_answers_of_queries_are_not_read(method: Method) -> None:
    episode = real_episode(1)
    hidden = replace(episode, queries=tuple(Query(query.text) for query in episode.queries))
    wrong = replace(episode, queries=tuple(Query(query.text, 3) for query in episode.queries))
    same(one(method, hidden), one(method, episode))
    same(one(method, wrong), one(method, episode))


def test_queries_and_episodes_are_scored_apart(method: Method) -> None:
    episode, other = real_episode(1), real_episode(0)
    together = method.scores([episode, other])
    for i, query in enumerate(episode.queries):
        alone = one(method, replace(episode, queries=(query,)))
        np.testing.assert_allclose(together[0].log_probs[i : i + 1], alone.log_probs, atol=2e-4)
    same(together[1], one(method, other))


def test_no_query_gives_no_row(method: Method) -> None:
    scores = one(method, replace(real_episode(1), queries=()))
    assert scores.log_probs.shape == (0, 4)
    assert scores.out_of_scope.shape == (0,)


@pytest.mark.parametrize("k_shot", [0, 1])
def test_none_of_the_above_is_ruled_out_and_changes_nothing(method: Method, k_shot: int) -> None:
    episode = real_episode(k_shot)
    closed, opened = one(method, episode), one(method, replace(episode, options=(*episode.options, NONE)))
    assert (opened.log_probs[:, -1] == -np.inf).all()
    assert (opened.log_probs.argmax(1) < 4).all()
    same(replace(opened, log_probs=opened.log_probs[:, :-1]), closed)


def test_one_option_is_certain(method: Method) -> None:
    for demos in ((), (Demo("rain", 0),)):
        episode = Episode((Option("weather"), NONE), demos, (Query("rain"),))
        assert one(method, episode).log_probs.tolist() == [[0.0, -np.inf]]
    with pytest.raises(PromptError, match="no option besides"):
        one(method, Episode((NONE,), (), (Query("rain"),)))


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("shots", [0, 1, 3])
def test_a_separable_episode_is_solved(encoder: SentenceEncoder, name: str, shots: int) -> None:
    words = ["will it rain", "my card was stolen", "when do you open"]
    options = tuple(Option(word if not shots else f"label {i}") for i, word in enumerate(words))
    demos = tuple(Demo(word, i) for i, word in enumerate(words) for _ in range(shots))
    queries = tuple(Query(word, i) for i, word in enumerate(words))
    scores = one(METHODS[name](encoder), Episode(options, demos, queries))
    assert scores.log_probs.argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", LEARNERS)
def test_an_option_without_demos_is_known_by_its_name(encoder: SentenceEncoder, name: str) -> None:
    options = (Option("will it rain"), Option("card"), Option("b", "when do you open"))
    queries = (Query("will it rain"), Query("my card was stolen"), Query("b: when do you open"))
    episode = Episode(options, (Demo("my card was stolen", 1),), queries)
    scores = one(METHODS[name](encoder), episode)
    assert scores.log_probs.argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "tfidf"])
def test_out_of_scope_grows_with_distance(encoder: SentenceEncoder, name: str) -> None:
    episode = Episode(
        (Option("a"), Option("b"), NONE),
        (Demo("will it rain", 0), Demo("my card was stolen", 1)),
        (Query("will it rain"), Query("<x> zzz 000 qqq qqq")),
    )
    known, unknown = one(METHODS[name](encoder), episode).out_of_scope
    assert unknown > known


def test_chance_and_majority() -> None:
    options = (Option("a"), Option("b"), NONE)
    episode = Episode(options, (Demo("x", 1), Demo("y", 1), Demo("z", 0)), (Query("q"), Query("r")))
    np.testing.assert_allclose(one(Chance(), episode).log_probs, np.log(1 / 3))
    assert one(Chance(), episode).out_of_scope.tolist() == [0, 0]
    assert one(Majority(), episode).log_probs.argmax(1).tolist() == [1, 1]
    np.testing.assert_allclose(np.exp(one(Majority(), episode).log_probs), [[0.4, 0.6, 0]] * 2)
    tied = replace(episode, demos=(Demo("x", 1), Demo("z", 0)))
    assert one(Majority(), tied).log_probs.argmax(1).tolist() == [0, 0]


def test_names_are_shown_with_their_descriptions() -> None:
    assert name_text(Option("refund", "asks for money back")) == "refund: asks for money back"
    assert name_text(Option("refund", "refund")) == name_text(Option("refund")) == "refund"


def test_centroid_arithmetic(encoder: SentenceEncoder) -> None:
    episode = Episode((Option("a"), Option("b")), (Demo("rain", 0), Demo("cold", 0), Demo("card", 1)), (Query("sun"),))
    rain, cold, card, sun, a, b = encoder.encode(["rain", "cold", "card", "sun", "a", "b"]).astype(float)
    means = [(rain + cold + 0.3 * a), (card + 0.3 * b)]
    cosines = np.array([sun @ mean / np.linalg.norm(mean) for mean in means])
    scores = one(EmbeddingCentroid(encoder, names=0.3, temperature=0.1), episode)
    np.testing.assert_allclose(scores.log_probs[0], log_softmax(cosines / 0.1), atol=1e-9)
    np.testing.assert_allclose(scores.out_of_scope, -cosines.max(), atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_knn_votes_as_written_out(encoder: SentenceEncoder, k: int) -> None:
    rng = random.Random(k)
    words = ["rain", "card", "open", "close", "stolen", "awful", "cold", "sunny", "bank", "where"]
    drawn = [" ".join(three) for three in rng.sample(list(itertools.permutations(words, 3)), 43)]
    texts, queries = drawn[:23], drawn[23:]
    answers = [0] * 9 + [1] * 7 + [2] * 7
    episode = Episode(
        (Option("a"), Option("b"), Option("c")),
        tuple(Demo(text, answer) for text, answer in zip(texts, answers, strict=True)),
        tuple(Query(query) for query in queries),
    )
    found = one(EmbeddingKNN(encoder, k=k, names=False, temperature=0.2), episode).log_probs
    cosines = encoder.encode(queries).astype(float) @ encoder.encode(texts).astype(float).T
    for row, cosine in zip(found, cosines, strict=True):
        nearest = np.argsort(-cosine)[: min(k, 9)]
        votes = [sum(np.exp(cosine[i] / 0.2) for i in nearest if answers[i] == label) for label in range(3)]
        assert row.argmax() == np.argmax(votes)
        # Classes that have votes share probability in proportion to them; the others get less.
        voted = [label for label in range(3) if votes[label]]
        np.testing.assert_allclose(
            np.exp(row[voted] - logsumexp(row[voted])), np.array(votes)[voted] / sum(votes), atol=1e-5
        )
        assert all(row[label] <= row[voted].max() for label in range(3))


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_is_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(0)
    examples, queries = rng.normal(size=(12, 40)), rng.normal(size=(5, 40))
    labels = np.arange(12) % classes
    expected = LogisticRegression(C=3, max_iter=5000, tol=1e-8).fit(examples, labels).predict_log_proba(queries)
    found = logistic(examples, labels, queries, 3)  # fewer examples than features: fitted in their span
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_tfidf_copes_with_any_text() -> None:
    episode = Episode(
        (Option("!"), Option("卡片")), (Demo("", 0), Demo("?!", 0), Demo("我的卡片", 1)), (Query(""), Query("卡片"))
    )
    scores = one(TfidfLogReg(), episode)
    assert np.isfinite(scores.log_probs).all()
    assert scores.log_probs[1].argmax() == 1


def test_cut_demonstrations_are_counted(encoder: SentenceEncoder) -> None:
    episode = Episode(
        (Option("a"), Option("b")), (Demo("rain " * 300, 0), Demo("card", 1)), (Query("rain"), Query("card"))
    )
    for name in ("centroid", "knn", "logreg", "setfit"):
        assert one(METHODS[name](encoder), episode).shortened == 2


def test_arguments_out_of_range(encoder: SentenceEncoder) -> None:
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("names", lambda: EmbeddingCentroid(encoder, names=1.5)),
        ("temperature", lambda: EmbeddingCentroid(encoder, temperature=0)),
        ("k", lambda: EmbeddingKNN(encoder, k=0)),
        ("c", lambda: EmbeddingLogReg(encoder, c=-1)),
        ("out_of_scope", lambda: EmbeddingLogReg(encoder, out_of_scope="entropy")),  # type: ignore[arg-type]
        ("c", lambda: TfidfLogReg(c=0)),
    ]
    for name, make in wrong:
        with pytest.raises(ConfigError, match=rf"^{name}: "):
            make()


def test_setfit_leaves_everything_as_it_was(
    encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    method = setfit(encoder, max_steps=2, learning_rate=0.05)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
    episode = real_episode(2)
    first = one(method, episode)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.device.type == "cpu"
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.model.training
    np.testing.assert_array_equal(one(method, episode).log_probs, first.log_probs)
    # It did train: an untuned body gives other answers.
    assert not np.allclose(one(setfit(encoder, learning_rate=1e-12), episode).log_probs, first.log_probs, atol=1e-3)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_setfit_says_what_is_missing(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "setfit", None)
    from icl_markup.setfit_method import SetFit

    with pytest.raises(BackboneError, match="baselines"):
        SetFit(encoder)
    with pytest.raises(ConfigError, match="max_steps"):
        SetFit(encoder, max_steps=0)
