"""Scores of whole episodes: which queries share a prompt, which prompts share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from icl_markup.batching import cut_by_length
from icl_markup.episodes import Episode
from icl_markup.markup import Markup
from icl_markup.names import name_tokens
from icl_markup.prompt import Prompt
from icl_markup.sharing import shared_scores

if TYPE_CHECKING:
    from icl_markup.model import MarkupModel


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
    """A prompt of one query of an episode, and what it counts for in a batch."""

    prompt: Prompt
    episode: Episode
    tokens: int


def score_queries(
    model: MarkupModel, markup: Markup, episodes: Sequence[Episode], batch_tokens: int
) -> list[list[QueryScores]]:
    """Score the options of every query of every episode; arguments and errors are those of `MarkupModel.scores`.

    Each query has a prompt of its own. Prompts of a causal backbone that begin alike share the work for that
    (`icl_markup.sharing`).
    """
    asked = [item for episode in episodes for item in _composed(model, markup, episode)]
    found: dict[int, QueryScores] = {}
    if model.backbone.kind == "causal":
        prompts = [item.prompt for item in asked]
        shared = shared_scores(model, markup, prompts, [item.episode for item in asked], batch_tokens)
        found = {i: QueryScores(row, prompts[i].shortened, prompts[i].dropped) for i, row in shared.items()}
    rest = [i for i in range(len(asked)) if i not in found]
    for part in cut_by_length([asked[i].tokens for i in rest], batch_tokens):
        group = [rest[k] for k in part]
        items = [asked[i] for i in group]
        terms = model.loss_terms([item.prompt for item in items], [item.episode for item in items], False, markup)
        for i, (prompt, episode, _), row in zip(group, items, terms.scores.cpu(), strict=True):
            found[i] = QueryScores(row[: len(episode.options)], prompt.shortened, prompt.dropped)
    flat = iter([found[i] for i in range(len(asked))])
    return [[next(flat) for _ in episode.queries] for episode in episodes]


def _composed(model: MarkupModel, markup: Markup, episode: Episode) -> Iterator[_Asked]:
    """Compose a prompt for each query of an episode, in order."""
    named = markup.answers == "names"
    for query in episode.queries:
        part = replace(episode, queries=(query,))
        prompt = markup.compose(part)
        tokens = name_tokens(model.backbone, markup, [prompt], part) if named else len(prompt.ids)
        yield _Asked(prompt, part, tokens)
