"""Scores of whole episodes: which queries share a prompt, which prompts share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from icl_markup.batching import cut_by_length
from icl_markup.episodes import Episode
from icl_markup.markup import Markup
from icl_markup.names import name_copies
from icl_markup.prompt import Prompt
from icl_markup.sharing import shared_scores

if TYPE_CHECKING:
    from icl_markup.model import MarkupModel

MOST_QUERIES = 16
"""The most queries in one prompt. They share the work for options and demonstrations, but attention's work grows with
the square of a prompt's length."""


LONGER = 1.25
"""Where one query's prompt is longer than a batch may be, and so has a batch of its own, a prompt that several share
may be so many times longer than that."""


@dataclass(frozen=True)
class QueryScores:
    """The scores of one query's options.

    Attributes:
        scores: shape (options,), fp32, on the CPU: logits of the options' symbols, or log-probabilities of their
            names; a softmax over them gives probabilities.
        shortened: demonstrations that were shortened to fit.
        dropped: demonstrations that were left out.
    """

    scores: Tensor
    shortened: int
    dropped: int


class _Asked(NamedTuple):
    """A prompt of some queries of an episode, and what it counts for in a batch."""

    prompt: Prompt
    episode: Episode
    tokens: int


def score_queries(
    model: MarkupModel, markup: Markup, episodes: Sequence[Episode], batch_tokens: int
) -> list[list[QueryScores]]:
    """Score the options of every query of every episode; arguments and errors are those of `MarkupModel.scores`.

    Where the backbone keeps queries in one prompt apart (`Backbone.local_layers`), queries of an episode share
    prompts if that shortens no demonstration; else each has a prompt of its own. Their scores are the same. Prompts
    of a causal backbone that begin alike share the work for that (`icl_markup.sharing`).
    """
    asked = [item for episode in episodes for item in _composed(model, markup, episode, batch_tokens)]
    found: dict[int, list[QueryScores]] = {}
    if model.backbone.kind == "causal":
        prompts = [item.prompt for item in asked]
        shared = shared_scores(model, markup, prompts, [item.episode for item in asked], batch_tokens)
        found = {i: [QueryScores(row, prompts[i].shortened, prompts[i].dropped)] for i, row in shared.items()}
    rest = [i for i in range(len(asked)) if i not in found]
    for part in cut_by_length([asked[i].tokens for i in rest], batch_tokens):
        group = [rest[k] for k in part]
        items = [asked[i] for i in group]
        terms = model.loss_terms([item.prompt for item in items], [item.episode for item in items], False, markup)
        rows = iter(terms.scores.cpu())
        for i, (prompt, episode, _) in zip(group, items, strict=True):
            scores = [next(rows)[: len(episode.options)] for _ in episode.queries]
            found[i] = [QueryScores(row, prompt.shortened, prompt.dropped) for row in scores]
    flat = (one for i in range(len(asked)) for one in found[i])
    return [[next(flat) for _ in episode.queries] for episode in episodes]


def _composed(model: MarkupModel, markup: Markup, episode: Episode, batch_tokens: int) -> Iterator[_Asked]:
    """Compose an episode's queries in order, several a prompt where those are not longer than a batch may be."""
    most = MOST_QUERIES if model.backbone.local_layers else 1
    copies = name_copies(model.backbone, markup, episode) if markup.answers == "names" else 1
    limit = batch_tokens
    if most > 1 and len(episode.queries) > 1:
        markup.check(episode)
        single = markup.compose_whole(replace(episode, queries=episode.queries[:1]))
        limit = max(limit, int(LONGER * copies * len(single.ids)) if single else 0)
    start = 0
    while start < len(episode.queries):
        part = replace(episode, queries=episode.queries[start : start + most])
        if len(part.queries) == 1:
            prompt = markup.compose(part)
        else:
            whole = markup.compose_whole(part)
            if whole is None or copies * len(whole.ids) > limit:
                most = len(part.queries) // 2
                continue
            prompt = whole
        yield _Asked(prompt, part, len(prompt.ids) * copies)
        start += len(part.queries)
