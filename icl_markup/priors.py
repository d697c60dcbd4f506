"""What options get without evidence, asked of the model itself and taken off its answers.

A model favors some options whatever the text is: by their letter, by how common a name is, by how long it is. Probes
without content show by how much. They are queries of the same prompt, so that its context is read once for all.

References: contextual calibration (Zhao et al. 2021, arXiv 2102.09690), domain-context calibration (Fei et al. 2023,
arXiv 2305.19148), batch calibration (Zhou et al. 2024, arXiv 2309.17249), domain-conditional PMI (Holtzman et al. 2021,
arXiv 2104.08315).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

from icl_markup.episodes import Episode, Query
from icl_markup.tasks import NONE_OF_THE_ABOVE

if TYPE_CHECKING:
    from icl_markup.model import MarkupModel

Floats = NDArray[np.float64]
Prior = Literal["none", "contextual", "domain", "unconditional"]
"""How the prior is found: not at all; from content-free texts in the same prompt; from texts of random words of the
domain in the same prompt; from content-free texts in a prompt without options and demonstrations, which is the same
for every text."""

PriorChoice = Literal["auto", "none", "contextual", "domain", "unconditional"]
"""The same, or what suits the model: `MarkupModel.prior`."""

CONTENT_FREE = ("N/A", "[MASK]", "...")
"""Texts without content (Zhao et al. 2021, whose third is the empty text; a prompt here needs one)."""

DOMAIN_TEXTS = 10
"""Texts of random words, of which domain-context calibration takes the mean (Fei et al. 2023 take 20)."""


@dataclass(frozen=True)
class EpisodeLogProbs:
    """Answers to the queries of one episode.

    Attributes:
        log_probs: shape (queries, options); the exponentials of a row add up to 1.
        shortened: for each query, how many demonstrations were shortened to fit.
        dropped: the same for those that were left out.
    """

    log_probs: Floats
    shortened: tuple[int, ...]
    dropped: tuple[int, ...]


def log_probs_of(
    model: MarkupModel, episodes: Sequence[Episode], prior: Prior, batch_tokens: int
) -> list[EpisodeLogProbs]:
    """Answer every query of every episode, with the prior taken off.

    Args:
        model: the model.
        episodes: the episodes.
        prior: how the prior is found.
        batch_tokens: the most tokens of one forward pass.

    Raises:
        PromptError: a prompt cannot be composed.
    """
    return log_probs_by_prior(model, episodes, (prior,), batch_tokens)[prior]


def log_probs_by_prior(
    model: MarkupModel, episodes: Sequence[Episode], priors: Collection[Prior], batch_tokens: int
) -> dict[Prior, list[EpisodeLogProbs]]:
    """Do what `log_probs_of` does with each of several priors; what they have in common is asked once."""
    probes = [{prior: _probes(episode, prior) for prior in priors} for episode in episodes]
    asked = [
        replace(episode, queries=episode.queries + tuple(chain.from_iterable(of.values())))
        for episode, of in zip(episodes, probes, strict=True)
    ]
    bare = dict.fromkeys(_bare(episode) for episode in episodes) if "unconditional" in priors else {}
    found = model.scores([*asked, *bare], batch_tokens)
    rows = [log_softmax(np.array([one.scores.double().numpy() for one in each]), axis=1) for each in found]
    alone = dict(zip(bare, rows[len(asked) :], strict=True))
    results: dict[Prior, list[EpisodeLogProbs]] = {prior: [] for prior in priors}
    for episode, of, answers, own in zip(episodes, probes, found, rows, strict=False):
        end = len(episode.queries)
        raw, asked_of = own[:end], answers[:end]
        shortened = tuple(one.shortened for one in asked_of)
        dropped = tuple(one.dropped for one in asked_of)
        for prior, texts in of.items():
            start, end = end, end + len(texts)
            log_probs = raw
            if prior != "none":
                sample = alone[_bare(episode)] if prior == "unconditional" else own[start:end]
                log_probs = without_prior(raw, sample, names_of(episode))
            results[prior].append(EpisodeLogProbs(log_probs, shortened, dropped))
    return results


def without_prior(log_probs: Floats, sample: Floats, names: Sequence[str]) -> Floats:
    """Divide probabilities by their mean over a sample.

    "none of the above" keeps its odds: that nothing fits a text without content is not a bias.

    Args:
        log_probs: shape (queries, options).
        sample: the same of texts that show the prior, (texts, options).
        names: the options' names.

    Returns:
        Log-probabilities, the same shape as `log_probs`.
    """
    labels = len(names) - (names[-1] == NONE_OF_THE_ABOVE)
    prior = np.zeros(len(names))
    prior[:labels] = log_softmax(logsumexp(sample[:, :labels], axis=0)) + np.log(labels)
    return np.asarray(log_softmax(log_probs - prior, axis=1))


def names_of(episode: Episode) -> list[str]:
    """Return the names of an episode's options."""
    return [option.name for option in episode.options]


def _probes(episode: Episode, prior: Prior) -> tuple[Query, ...]:
    if prior == "contextual":
        return tuple(Query(text) for text in CONTENT_FREE)
    if prior == "domain":
        texts = [demo.text for demo in episode.demos] or names_of(episode)
        words = [word for text in texts for word in text.split()] or [CONTENT_FREE[0]]  # blank texts are refused later
        length = max(1, round(len(words) / len(texts)))
        rng = random.Random(" ".join(texts))
        return tuple(Query(" ".join(rng.choices(words, k=length))) for _ in range(DOMAIN_TEXTS))
    return ()


def _bare(episode: Episode) -> Episode:
    """Return content-free texts that are asked without showing options or demonstrations."""
    queries = tuple(Query(text) for text in CONTENT_FREE)
    return Episode(episode.options, (), queries, "", episode.task_description, shows_options=False)
