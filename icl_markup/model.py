"""`MarkupModel`: a backbone, a template and its tags, from episodes to label probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icl_markup.backbone import Backbone
from icl_markup.batching import Batch, cut_by_length
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import PromptError, nearest
from icl_markup.loading import BackboneConfig
from icl_markup.markup import Answers, Markup
from icl_markup.names import name_scores
from icl_markup.prompt import Prompt
from icl_markup.tags import Initialisation, Tag, TagTable, initial_rows
from icl_markup.tasks import NONE_OF_THE_ABOVE
from icl_markup.template import Template


@dataclass(frozen=True)
class Prediction:
    """The answer to one text.

    Attributes:
        text: the text.
        label: the most probable label.
        probabilities: every label's probability, in the order of the options.
    """

    text: str
    label: str
    probabilities: dict[str, float]


class MarkupModel:
    """Composes prompts with one template and reads the answers of one frozen backbone.

    Args:
        backbone: the frozen model.
        template: the template, or its name or path.
        vectors: the tags' soft tokens by name, each of shape (width, embedding width); tags that it lacks
            (all, by default) are initialised.
        answers: ``symbols``: read the options' letters at the slot; ``names``: score whole label names.
        length_normalised: with ``names``, score by the mean log-probability of a token instead of the sum.
        initialisation: how tags without vectors are initialised.
        seed: seeds that.

    Raises:
        TemplateError, PromptError: the template, or the vectors for it, cannot be used.
    """

    def __init__(
        self,
        backbone: Backbone,
        template: Template | str | Path = "markup",
        vectors: dict[str, Tensor] | None = None,
        *,
        answers: Answers = "symbols",
        length_normalised: bool = True,
        initialisation: Initialisation = "description",
        seed: int = 0,
    ):
        self.backbone = backbone
        self.template = template if isinstance(template, Template) else Template.load(template)
        self.length_normalised = length_normalised
        self.table = _table(backbone, self.template.tags, initialisation, seed) if self.template.tags else None
        if vectors:
            if self.table is None:
                raise PromptError(f"template {self.template.name!r} has no tags to give vectors to")
            self.table.load_vectors(vectors)
        self.markup = Markup(
            self.template,
            backbone.encoder,
            backbone.layout,
            self.table,
            answers=answers,
            max_length=backbone.max_length,
        )

    @classmethod
    def from_pretrained(
        cls, backbone: str | BackboneConfig = "embedded", template: str | Path = "markup", **options: Any
    ) -> MarkupModel:
        """Load a backbone by folder, hub name or configuration, with fresh tags of `template`.

        Raises:
            BackboneError, TemplateError: either cannot be loaded.
        """
        return cls(Backbone.load(backbone), template, **options)

    @classmethod
    def from_tags(cls, folder: str | Path, backbone: Backbone | BackboneConfig | None = None) -> MarkupModel:
        """Load warmed-up tags, and the backbone they were made for unless one is given.

        Raises:
            TagFileError: the folder is missing or damaged, or the tags were made for another backbone.
        """
        from icl_markup.tagfile import load_model

        return load_model(folder, backbone)

    def save(self, folder: str | Path, training: dict[str, Any] | None = None) -> Path:
        """Write the tags as a folder that `from_tags` loads; see `icl_markup.tagfile`.

        Args:
            folder: where to; an existing tag folder is replaced, atomically.
            training: a JSON-able summary of how the tags were warmed up, for the card.

        Raises:
            TagFileError: the template has no tags, or `folder` holds something else.
        """
        from icl_markup.tagfile import save_model

        return save_model(self, folder, training)

    @property
    def answers(self) -> Answers:
        """Whether option symbols or whole names are read."""
        return self.markup.answers

    def loss_terms(self, prompts: Sequence[Prompt], episodes: Sequence[Episode], all_slots: bool) -> SlotScores:
        """Return differentiable scores of every supervised slot; see `SlotScores`."""
        if self.answers == "names":
            scores = name_scores(self.backbone, self.markup, prompts, episodes, self.table, self.length_normalised)
            answers = [slot.answer for prompt in prompts for slot in prompt.slots]
            targets = torch.tensor([-1 if answer is None else answer for answer in answers], device=scores.device)
            return SlotScores(scores, targets, torch.ones_like(targets, dtype=torch.bool))
        batch = Batch.of_prompts(prompts, self.pad_id, all_slots=all_slots)
        scores = self.backbone.candidate_logits(batch, self.table)
        return SlotScores(scores, batch.targets.to(scores.device), batch.is_query)

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch; masked out, so any ordinary id does where there is no padding token."""
        pad = self.backbone.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @torch.inference_mode()
    def scores(self, episodes: Sequence[Episode], batch_tokens: int = 8192) -> list[Tensor]:
        """Return the options' scores for every query of every episode.

        Args:
            episodes: the episodes; each query gets a prompt of its own.
            batch_tokens: the most tokens a batch may hold, padding included.

        Returns:
            For each episode a tensor of shape (queries, options), fp32, on the CPU: logits of the options'
            symbols, or log-probabilities of their names. A softmax over the options gives probabilities.
        """
        singles = [
            Episode(e.options, e.demos, (query,), e.task, e.task_description) for e in episodes for query in e.queries
        ]
        prompts = [self.markup.compose(single) for single in singles]
        rows: list[Tensor | None] = [None] * len(singles)
        # Names are scored in as many copies of a prompt as there are options.
        copies = [len(s.options) if self.answers == "names" else 1 for s in singles]
        lengths = [len(p.ids) * n for p, n in zip(prompts, copies, strict=True)]
        for indices in cut_by_length(lengths, batch_tokens):
            terms = self.loss_terms([prompts[i] for i in indices], [singles[i] for i in indices], all_slots=False)
            for row, i in zip(terms.scores.cpu(), indices, strict=True):
                rows[i] = row[: len(singles[i].options)]
        flat = iter([row for row in rows if row is not None])
        return [torch.stack([next(flat) for _ in e.queries]) for e in episodes]

    def classify(
        self,
        texts: Iterable[str],
        labels: Sequence[str] | dict[str, str],
        demos: Iterable[tuple[str, str]] = (),
        *,
        none_of_the_above: bool = False,
        task_description: str = "",
        batch_tokens: int = 8192,
    ) -> list[Prediction]:
        """Classify texts, given label names and, optionally, demonstrations; nothing is trained.

        Args:
            texts: the texts to classify.
            labels: label names, or a mapping from names to longer descriptions.
            demos: pairs of text and label.
            none_of_the_above: offer that as a last option.
            task_description: for templates with the field ``{task}``.
            batch_tokens: the most tokens a batch may hold, padding included.

        Returns:
            One `Prediction` a text, in order.

        Raises:
            PromptError: a text is empty, labels are too few, too many or not distinct, a demonstration has an
                unknown label, or the prompt does not fit the backbone even without demonstrations.
        """
        episode = self.episode(labels, demos, none_of_the_above=none_of_the_above, task_description=task_description)
        texts = list(texts)
        if not texts:
            return []
        queries = tuple(Query(text) for text in texts)
        scores = self.scores([Episode(episode.options, episode.demos, queries, "", task_description)], batch_tokens)[0]
        names = [option.name for option in episode.options]
        predictions = []
        for text, row in zip(texts, scores.double().softmax(-1).tolist(), strict=True):
            probabilities = dict(zip(names, row, strict=True))
            predictions.append(Prediction(text, max(names, key=probabilities.__getitem__), probabilities))
        return predictions

    @staticmethod
    def episode(
        labels: Sequence[str] | dict[str, str],
        demos: Iterable[tuple[str, str]] = (),
        *,
        none_of_the_above: bool = False,
        task_description: str = "",
    ) -> Episode:
        """Build an episode without queries from label names and demonstrations; errors as in `classify`."""
        described = labels if isinstance(labels, dict) else dict.fromkeys(labels, "")
        names = [name.strip() for name in (labels if isinstance(labels, Sequence) else described)]
        if isinstance(labels, str):
            raise PromptError("labels is one string; give a list of label names")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PromptError(f"label {twice!r} is given twice")
        if none_of_the_above:
            names.append(NONE_OF_THE_ABOVE)
        index = {name: i for i, name in enumerate(names)}
        shown = []
        for text, label in demos:
            if label.strip() not in index:
                raise PromptError(f"demonstration {text!r} has label {label!r}, not one given{nearest(label, names)}")
            shown.append(Demo(text, index[label.strip()]))
        options = tuple(Option(name, described.get(name, "")) for name in names)
        return Episode(options, tuple(shown), (), "", task_description)


@dataclass(frozen=True)
class SlotScores:
    """Scores at slots.

    Attributes:
        scores: (slots, most options), fp32; -inf where a slot has fewer options.
        targets: the right option of each slot, -1 where it is unknown, (slots,).
        is_query: which slots are queries', (slots,), bool.
    """

    scores: Tensor
    targets: Tensor
    is_query: Tensor


def _table(backbone: Backbone, tags: Sequence[Tag], initialisation: Initialisation, seed: int) -> TagTable:
    rows = initial_rows(
        tags, backbone.embedding, backbone.vocabulary, backbone.encoder.encode, method=initialisation, seed=seed
    )
    return TagTable(tags, rows, backbone.first_tag_id).to(backbone.device)
