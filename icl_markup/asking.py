"""Asks a model about texts, given any number of labels and demonstrations: what each prompt shows, in which orders."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import factorial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from icl_markup.drawing import reorder
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import PromptError
from icl_markup.model import MarkupModel
from icl_markup.priors import Prior, log_probs_of
from icl_markup.retrieval import TEMPERATURE
from icl_markup.retrievers import Retriever, similarities
from icl_markup.selection import label_similarity, nearest_demos, single
from icl_markup.tasks import NONE_OF_THE_ABOVE

SPARE = 64
"""Everything fits one prompt if so many tokens are left for a query; a longer query has a prompt chosen for it."""


class Asked(NamedTuple):
    """One prompt's episode: which texts its queries are, the column of each of its options, the retriever's opinion."""

    rows: list[int]
    episode: Episode
    columns: list[int]
    opinion: NDArray[np.float64] | float = 0.0


FEWEST = 8
"""Fewer tokens than this for a text are an error in the labels."""


@dataclass(frozen=True)
class Asker:
    """Labels, demonstrations, and how they are put into prompts.

    Attributes:
        model: the backbone with its tags.
        labels: the labels, as options.
        demos: the demonstrations.
        offers_none: offer "none of the above" as the last option.
        retriever: chooses options and demonstrations for each text where they do not fit one prompt.
        options: labels a prompt, where they are chosen.
        most_demos: demonstrations a prompt, where they are chosen.
        weight: where they are chosen, how much the retriever's similarity counts beside the prompt's answer: their
            probabilities are multiplied (a product of experts, Hinton 2002), the retriever's to this power.
        n_permutations: orders of the options, over which probabilities are averaged, if there are so many; "none of
            the above" stays last.
        prior: how the prior of the options is found, which is divided out (`icl_markup.priors`).
        seed: seeds the orders.
        task_description: for templates with the field ``{task}``.
    """

    model: MarkupModel
    labels: tuple[Option, ...]
    demos: tuple[Demo, ...]
    retriever: Retriever
    offers_none: bool = False
    options: int = 10
    most_demos: int = 20
    weight: float = 0.0
    n_permutations: int = 1
    prior: Prior = "none"
    seed: int = 0
    task_description: str = ""

    @cached_property
    def whole(self) -> Episode:
        """Every label and demonstration, without a query."""
        none = (Option(NONE_OF_THE_ABOVE),) if self.offers_none else ()
        return Episode(self.labels + none, self.demos, (), "", self.task_description)

    @cached_property
    def _whole_room(self) -> int:
        """The most tokens of a query beside every label and demonstration; 0 where each text has a chosen prompt."""
        markup = self.model.markup
        most = markup.most_options
        if most is not None and len(self.whole.options) > most:
            return 0
        prompt = markup.compose_whole(replace(self.whole, queries=(Query("?"),)))
        room = 0 if prompt is None else markup.room(prompt, self.whole)
        return room if room >= SPARE else 0

    @property
    def retrieves(self) -> bool:
        """Whether each text has a prompt of its own choice, as one with everything would be too long."""
        return not self._whole_room

    @cached_property
    def most_tokens(self) -> int:
        """The most tokens of a text beside the labels that its prompt shows, without demonstrations; at least 1."""
        episode = self._longest()
        return max(1, self.model.markup.room(self.model.markup.compose(episode), episode))

    def log_probs(self, texts: Sequence[str], batch_tokens: int = 4096) -> NDArray[np.float64]:
        """Return log-probabilities of the labels, and of "none of the above" in a last column where it is offered.

        Args:
            texts: the texts to classify.
            batch_tokens: the most tokens of one forward pass.

        Returns:
            Shape (texts, labels (+ 1)); -inf where a prompt did not offer a label.

        Raises:
            PromptError: a text is empty, or does not fit.
        """
        total = np.full((len(texts), len(self.whole.options)), -np.inf)
        first = self._first_order(texts)
        for permutation in range(self.orders):
            total = np.logaddexp(total, self._in_order(first, permutation, total.shape, batch_tokens))
        return np.asarray(total - np.log(self.orders) if self.orders > 1 else total)

    @property
    def orders(self) -> int:
        """The number of orders that are asked: no more than there are."""
        shown = len(self.labels) if not self.retrieves else min(self._most_options, len(self.labels))
        return min(self.n_permutations, factorial(min(shown, 12)))

    def _in_order(
        self, first: Sequence[Asked], permutation: int, shape: tuple[int, ...], batch_tokens: int
    ) -> NDArray[np.float64]:
        part = np.full(shape, -np.inf)
        asked = [self._ordered(one, permutation) for one in first]
        episodes = [one.episode for one in asked]
        for one, found in zip(asked, log_probs_of(self.model, episodes, self.prior, batch_tokens), strict=True):
            own = found.log_probs
            own = log_softmax(own + self.weight * one.opinion, axis=1)
            part[np.ix_(one.rows, one.columns)] = own
        return part

    def asked(self, texts: Sequence[str]) -> Iterator[tuple[int, Asked]]:
        """Yield the prompts' episodes, each with the number of its order of options."""
        first = self._first_order(texts)
        for permutation in range(self.orders):
            for one in first:
                yield permutation, self._ordered(one, permutation)

    def _first_order(self, texts: Sequence[str]) -> list[Asked]:
        whole, others = self._split(texts)
        chosen = [one._replace(rows=[others[i] for i in one.rows]) for one in self._chosen([texts[i] for i in others])]
        if whole:
            episode = replace(self.whole, queries=tuple(Query(texts[i]) for i in whole))
            chosen.insert(0, Asked(whole, episode, list(range(len(self.whole.options)))))
        return chosen

    def _split(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return which texts are asked beside every label and demonstration, and which have a chosen prompt."""
        encode = self.model.backbone.encoder.encode
        whole = [] if self.retrieves else [i for i, text in enumerate(texts) if len(encode(text)) <= self._whole_room]
        return whole, sorted(set(range(len(texts))) - set(whole))

    def _ordered(self, one: Asked, permutation: int) -> Asked:
        if permutation == 0:
            return one
        inside = len(one.columns) - self.offers_none
        # The rotations of one order put every option in every place once; the first order is the labels' own.
        order = list(range(inside))
        if permutation >= inside:
            random.Random(f"{self.seed}/{permutation // inside}").shuffle(order)
        shift = permutation % inside
        order = [*order[shift:], *order[:shift], *range(inside, len(one.columns))]
        opinion = one.opinion if isinstance(one.opinion, float) else one.opinion[order]
        return Asked(one.rows, reorder(one.episode, order), [one.columns[i] for i in order], opinion)

    def recall(self, texts: Sequence[str], answers: Sequence[int]) -> float:
        """Return the share of texts whose right label is among their prompts' options; 1 where all are shown.

        Args:
            texts: the texts.
            answers: the index of each text's right label.
        """
        _, others = self._split(texts)
        chosen = self._chosen([texts[i] for i in others])
        missed = sum(answers[i] not in one.columns for i, one in zip(others, chosen, strict=True))
        return 1 - missed / len(texts) if texts else 1.0

    @cached_property
    def _stored(self) -> tuple[list[str], NDArray[np.intp]]:
        names = [option.name for option in self.labels]
        owners = [*range(len(names)), *(demo.answer for demo in self.demos)]
        return [*names, *(demo.text for demo in self.demos)], np.array(owners, dtype=np.intp)

    def _chosen(self, texts: Sequence[str]) -> Iterator[Asked]:
        if not texts:
            return
        stored, owners = self._stored
        labels = len(self.labels)
        similarity = similarities(self.retriever, texts, stored)
        near = label_similarity(similarity, owners, labels)
        for row, text in enumerate(texts):
            options = np.argsort(-near[row], kind="stable")[: self._most_options].tolist()
            shown = nearest_demos(similarity[row, labels:], owners[labels:], options, self.most_demos)
            # The nearest label and "none of the above" stand level: how near is near differs between retrievers.
            opinion = (near[row, options] - near[row, options[0]]) / TEMPERATURE
            if self.offers_none:
                options, opinion = [*options, labels], np.append(opinion, 0.0)
            demos = [self.demos[j] for j in shown]
            yield Asked([row], single(self.whole, Query(text), options, demos), options, opinion)

    @property
    def _most_options(self) -> int:
        most = self.model.markup.most_options
        return self.options if most is None else min(self.options, most - self.offers_none)

    def check(self) -> None:
        """Compose a prompt of the longest labels, so that what can never work is said before a text is asked.

        Raises:
            PromptError: there are fewer than two options, a name or demonstration is empty, or names are too long.
        """
        if len(self.whole.options) < 2:
            count = "1 class" if self.labels else "no class"
            raise PromptError(f"{count}: give two labels or more, or one and none_of_the_above='option'")
        markup = self.model.markup
        if markup.answers == "names":
            for label in self.labels:
                if not markup.name_ids(label.name):
                    raise PromptError(f"label {label.name!r} has no token that the backbone knows; rename it")
        if self.most_tokens < FEWEST:
            raise PromptError(
                f"the longest label names leave {self.most_tokens} tokens for a text, of {markup.max_length} in all; "
                "shorten them, or lower options"
            )
        for i, demo in enumerate(self.demos):
            if not demo.text.strip():
                raise PromptError(f"demonstration {i} has an empty text")

    def _longest(self) -> Episode:
        """Return the longest labels that one prompt may show, without demonstrations, and a query."""
        if not self.retrieves:
            return replace(self.whole, queries=(Query("?"),), demos=())
        encode = self.model.backbone.encoder.encode
        length = [len(encode(f"{label.name} {label.description}")) for label in self.labels]
        longest = sorted(range(len(self.labels)), key=lambda i: -length[i])
        none = [len(self.labels)] if self.offers_none else []
        return single(self.whole, Query("?"), [*longest[: self._most_options], *none], [])
