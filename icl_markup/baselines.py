"""Rivals without a language model: chance, the majority, and classifiers on sentence embeddings or TF-IDF.

They are given what a prompt is given: an episode's option names and descriptions, its demonstrations and its query
texts. Each of them is a `Method`. They share four rules:

- Options and demonstrations are sorted before anything is computed, so that neither the options' nor the
  demonstrations' order can matter; a query's answer is never read.
- An option without a demonstration is represented by its name (and its description where it has one); without any
  demonstration that is all there is.
- "None of the above" has no demonstrations and cannot be learnt as a class: it gets a log-probability of -inf, and
  `out_of_scope` says how little any other option fits.
- Where the encoder does not read a demonstration to its end, it counts as shortened, once a query.

The defaults of `names` and `c` were settled on warm-up tasks, where names as examples add about 10 points at one
shot (snips, goemotions, huffpost41; 1 to 3 on clinc150, which has few left to give).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union

from icl_markup.episodes import Episode, Option
from icl_markup.errors import ConfigError, PromptError
from icl_markup.method import EpisodeScores
from icl_markup.sentences import SentenceEncoder
from icl_markup.tasks import NONE_OF_THE_ABOVE

Floats = NDArray[np.float64]
OutOfScope = Literal["distance", "max_probability"]
"""``distance``: minus the largest cosine to a class or example; ``max_probability``: 1 - the largest probability
(Hendrycks & Gimpel 2017)."""


@dataclass(frozen=True)
class Problem:
    """What a classifier sees of an episode, in an order that does not depend on the episode's.

    Attributes:
        columns: the index of each class among the episode's options; shape (classes,).
        names: each class's name, with its description where it has one.
        texts: the demonstrations.
        classes: the class of each demonstration; shape (demonstrations,).
        queries: the texts to classify, in the episode's order.
        options: the number of options of the episode, "none of the above" included.
    """

    columns: NDArray[np.intp]
    names: list[str]
    texts: list[str]
    classes: NDArray[np.intp]
    queries: list[str]
    options: int

    @classmethod
    def of(cls, episode: Episode) -> Problem:
        """Arrange an episode.

        Raises:
            PromptError: no option is left besides "none of the above".
        """
        shown = {demo.answer for demo in episode.demos}
        last = len(episode.options) - 1
        open_world = last >= 0 and episode.options[last].name == NONE_OF_THE_ABOVE and last not in shown
        columns = sorted(range(len(episode.options) - open_world), key=lambda i: episode.options[i])
        if not columns:
            raise PromptError(f"the episode has no option besides {NONE_OF_THE_ABOVE!r}; give it labels to choose from")
        position = {column: i for i, column in enumerate(columns)}
        demos = sorted((demo.text, position[demo.answer]) for demo in episode.demos)
        return cls(
            np.array(columns, dtype=np.intp),
            [name_text(episode.options[column]) for column in columns],
            [text for text, _ in demos],
            np.array([answer for _, answer in demos], dtype=np.intp),
            [query.text for query in episode.queries],
            len(episode.options),
        )

    def named(self, all_names: bool) -> NDArray[np.intp]:
        """Return the classes whose names serve as examples: all, or those without a demonstration."""
        every = np.arange(len(self.names))
        return every if all_names else np.setdiff1d(every, self.classes)

    def answers(self, log_probs: Floats, out_of_scope: Floats, shortened: int = 0) -> EpisodeScores:
        """Put the classes' log-probabilities, shape (queries, classes), where the episode has its options."""
        full = np.full((len(self.queries), self.options), -np.inf)
        full[:, self.columns] = log_probs
        return EpisodeScores(full, out_of_scope, shortened)


def name_text(option: Option) -> str:
    """Return what represents an option in words: its name, and its description where that says more."""
    if option.description and option.description != option.name:
        return f"{option.name}: {option.description}"
    return option.name


class Chance:
    """A uniform guess over all options, "none of the above" included; ``out_of_scope`` is 0."""

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        return [
            EpisodeScores(np.full((len(e.queries), len(e.options)), -np.log(len(e.options))), np.zeros(len(e.queries)))
            for e in episodes
        ]


class Majority:
    """The label with the most demonstrations, the first of several; with equally many of each that is chance.

    Probabilities are counts plus one, normalised (Laplace's rule); ``out_of_scope`` is 0.
    """

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        results = []
        for problem in map(Problem.of, episodes):
            counts = np.bincount(problem.classes, minlength=len(problem.names)) + 1.0
            log_probs = np.tile(np.log(counts / counts.sum()), (len(problem.queries), 1))
            results.append(problem.answers(log_probs, np.zeros(len(problem.queries))))
        return results


class EmbeddingCentroid:
    """The nearest class mean of sentence embeddings (Snell et al. 2017, prototypes, on a frozen encoder).

    A class's vector is the mean of its demonstrations' unit vectors and of its name's, scaled to unit length.
    Log-probabilities are a softmax of cosine / temperature.

    Args:
        encoder: encodes the texts.
        names: the weight of a class's name against one demonstration's, 0 to 1; without demonstrations the name
            alone counts.
        temperature: of the softmax, in units of cosine; it does not change the answers.
        out_of_scope: how ``out_of_scope`` is computed; the distance is that to the nearest class vector.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        *,
        names: float = 1.0,
        temperature: float = 0.05,
        out_of_scope: OutOfScope = "distance",
    ):
        if not 0 <= names <= 1:
            raise ConfigError(f"names: {names} is no weight between 0 and 1")
        self.encoder = encoder
        self.names = names
        self.temperature = positive("temperature", temperature)
        self.out_of_scope = known_out_of_scope(out_of_scope)

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        results = []
        for problem, vectors in _embedded(self.encoder, episodes):
            weight = np.full(len(problem.names), self.names)
            weight[problem.named(all_names=False)] = 1
            sums = weight[:, None] * vectors.names
            np.add.at(sums, problem.classes, vectors.texts)
            means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
            similarity = vectors.queries @ means.T
            log_probs = log_softmax(similarity / self.temperature, axis=1)
            odd = oddness(self.out_of_scope, similarity, log_probs)
            results.append(problem.answers(log_probs, odd, vectors.shortened))
        return results


class EmbeddingKNN:
    """Votes of the k nearest demonstrations, each weighted by exp(cosine / temperature).

    k is lowered to the number of demonstrations of the class that has most: 1 at one shot. A class without a
    demonstration takes part with its name. A class none of whose examples is among the k nearest is given the
    weight of its nearest example, which is less than any vote and keeps its probability above 0.

    Args:
        encoder: encodes the texts.
        k: the most neighbours that vote.
        names: each option's name is a further example; without that, only where an option has no demonstration.
        temperature: in units of cosine; the lower, the more the nearest neighbours count.
        out_of_scope: how ``out_of_scope`` is computed; the distance is that to the nearest example.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        *,
        k: int = 5,
        names: bool = True,
        temperature: float = 0.05,
        out_of_scope: OutOfScope = "distance",
    ):
        if k < 1:
            raise ConfigError(f"k: {k} is not positive")
        self.encoder = encoder
        self.k = k
        self.names = names
        self.temperature = positive("temperature", temperature)
        self.out_of_scope = known_out_of_scope(out_of_scope)

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        results = []
        for problem, vectors in _embedded(self.encoder, episodes):
            examples, classes = vectors.examples(problem, all_names=self.names)
            similarity = vectors.queries @ examples.T
            k = min(self.k, max(1, np.bincount(problem.classes, minlength=1).max()))
            log_probs = log_softmax(self._votes(similarity, classes, len(problem.names), k), axis=1)
            odd = oddness(self.out_of_scope, similarity, log_probs)
            results.append(problem.answers(log_probs, odd, vectors.shortened))
        return results

    def _votes(self, similarity: Floats, classes: NDArray[np.intp], count: int, k: int) -> Floats:
        """Return the logarithm of each class's votes; shape (queries, classes)."""
        scaled = (similarity - similarity.max(axis=1, keepdims=True)) / self.temperature
        order = np.argsort(-scaled, axis=1, kind="stable")[:, :k]
        weights = np.zeros_like(scaled)
        np.put_along_axis(weights, order, np.exp(np.take_along_axis(scaled, order, axis=1)), axis=1)
        summed = weights @ np.eye(count)[classes]
        nearest = np.full((count, len(similarity)), -np.inf)
        np.maximum.at(nearest, classes, scaled.T)
        votes = np.log(summed, out=np.full_like(summed, -np.inf), where=summed > 0)
        return np.asarray(np.maximum(votes, nearest.T))


class EmbeddingLogReg:
    """Logistic regression on unit-length sentence embeddings.

    The strength of the L2 penalty is one fixed number, because a few demonstrations leave nothing to choose it on:
    C = 100 in scikit-learn's terms. On warm-up tasks (clinc150, snips, goemotions, huffpost41; 1 and 5 shots) C from
    1 to 100 gave one accuracy within noise, and 100 the best log loss: unit vectors need large weights.

    Args:
        encoder: encodes the texts.
        c: the inverse strength of the penalty.
        names: each option's name is a further training example; without that, only where an option has no
            demonstration.
        out_of_scope: how ``out_of_scope`` is computed; the distance is that to the nearest training example.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        *,
        c: float = 100.0,
        names: bool = True,
        out_of_scope: OutOfScope = "distance",
    ):
        self.encoder = encoder
        self.c = positive("c", c)
        self.names = names
        self.out_of_scope = known_out_of_scope(out_of_scope)

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        results = []
        for problem, vectors in _embedded(self.encoder, episodes):
            examples, classes = vectors.examples(problem, all_names=self.names)
            log_probs = logistic(examples, classes, vectors.queries, self.c)
            odd = oddness(self.out_of_scope, vectors.queries @ examples.T, log_probs)
            results.append(problem.answers(log_probs, odd, vectors.shortened))
        return results


class TfidfLogReg:
    """Logistic regression on TF-IDF of words (1 and 2) and of characters within words (3 to 5).

    Vocabulary and document frequencies come from the episode's demonstrations and option names alone, never from
    the texts that are asked. ``out_of_scope`` is 1 - the largest probability.

    Args:
        c: the inverse strength of the L2 penalty, in scikit-learn's terms.
        names: each option's name is a further training example; without that, only where an option has no
            demonstration.

    Raises:
        ConfigError: `c` is not positive.
    """

    def __init__(self, *, c: float = 100.0, names: bool = True):
        self.c = positive("c", c)
        self.names = names

    def scores(self, episodes: Sequence[Episode]) -> list[EpisodeScores]:
        """Score every query of every episode; one result an episode, in order."""
        results = []
        for problem in map(Problem.of, episodes):
            # Signs count as words, so that no text but an empty one is without features.
            features = make_union(
                TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True),
                TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True),
            ).fit([*problem.texts, *problem.names])
            named = problem.named(self.names)
            examples = features.transform([*problem.texts, *(problem.names[i] for i in named)])
            queries = features.transform(problem.queries) if problem.queries else np.empty((0, examples.shape[1]))
            log_probs = logistic(examples, np.concatenate([problem.classes, named]), queries, self.c)
            results.append(problem.answers(log_probs, oddness("max_probability", log_probs, log_probs)))
        return results


def logistic(examples: Any, classes: NDArray[np.intp], queries: Any, c: float) -> Floats:
    """Fit a logistic regression (`sklearn.linear_model.LogisticRegression`) and apply it.

    Args:
        examples: dense or sparse, shape (examples, features).
        classes: the class of each example; every class from 0 on has one.
        queries: dense or sparse, shape (queries, features).
        c: the inverse strength of the L2 penalty.

    Returns:
        Log-probabilities, all finite, shape (queries, classes); 0 where there is one class only.
    """
    count = int(classes.max()) + 1
    if count == 1 or not queries.shape[0]:
        return np.zeros((queries.shape[0], count))
    if examples.shape[0] < examples.shape[1]:
        examples, queries = _in_span(examples, queries)
    model = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(examples, classes)
    return log_probabilities(model, queries)


def _in_span(examples: Any, queries: Any) -> tuple[Floats, Floats]:
    """Express vectors in an orthonormal basis of the examples' span; shapes (examples, rank), (queries, rank).

    A regression with an L2 penalty has its weights in that span (representer theorem): with fewer examples than
    features this is the same regression in fewer dimensions, many times faster.
    """
    values, vectors = np.linalg.eigh(_dense(examples @ examples.T))
    kept = values > 1e-10 * values[-1]
    scale = np.sqrt(values[kept])
    return vectors[:, kept] * scale, _dense(queries @ examples.T) @ (vectors[:, kept] / scale)


def _dense(matrix: Any) -> Floats:
    return np.asarray(matrix.toarray() if issparse(matrix) else matrix, dtype=np.float64)


def log_probabilities(model: LogisticRegression, queries: Any) -> Floats:
    """Return a fitted regression's log-probabilities, finite where `predict_log_proba` rounds to -inf."""
    decision = model.decision_function(queries)
    if decision.ndim == 1:  # of two classes scikit-learn gives the second's margin alone
        decision = np.stack([np.zeros_like(decision), decision], axis=1)
    return np.asarray(log_softmax(decision.astype(np.float64), axis=1))


@dataclass(frozen=True)
class _Vectors:
    """Unit vectors of a problem's texts, names and queries, as float64; and how many demonstrations were cut."""

    texts: Floats
    names: Floats
    queries: Floats
    shortened: int

    def examples(self, problem: Problem, all_names: bool) -> tuple[Floats, NDArray[np.intp]]:
        """Return training vectors with their classes: the demonstrations, then names."""
        named = problem.named(all_names)
        return np.concatenate([self.texts, self.names[named]]), np.concatenate([problem.classes, named])


def _embedded(encoder: SentenceEncoder, episodes: Sequence[Episode]) -> Iterator[tuple[Problem, _Vectors]]:
    """Encode everything in one go, then yield episode by episode."""
    problems = [Problem.of(episode) for episode in episodes]
    encoder.remember(chain.from_iterable([*p.texts, *p.names, *p.queries] for p in problems))
    for problem in problems:
        texts, names, queries = (
            encoder.encode(part).astype(np.float64) for part in (problem.texts, problem.names, problem.queries)
        )
        yield problem, _Vectors(texts, names, queries, encoder.too_long(problem.texts) * len(problem.queries))


def oddness(kind: OutOfScope, similarity: Floats, log_probs: Floats) -> Floats:
    """Return how little any class fits each query; shape (queries,).

    Args:
        kind: which measure.
        similarity: cosines of queries with classes or examples; shape (queries, classes or examples).
        log_probs: shape (queries, classes).
    """
    return np.asarray(-similarity.max(axis=1) if kind == "distance" else -np.expm1(log_probs.max(axis=1)))


def positive(name: str, value: float) -> float:
    """Return `value`, or raise a `ConfigError` that names the argument where it is not positive."""
    if not value > 0:
        raise ConfigError(f"{name}: {value} is not positive")
    return value


def known_out_of_scope(kind: OutOfScope) -> OutOfScope:
    """Return `kind`, or raise a `ConfigError` where it is none of the two."""
    if kind not in ("distance", "max_probability"):
        raise ConfigError(f"out_of_scope: {kind!r} is neither 'distance' nor 'max_probability'")
    return kind
