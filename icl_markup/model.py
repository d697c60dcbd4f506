"""`MarkupModel`: a backbone, a template and its tags, from episodes to label probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from icl_markup.answers import AUTO, Answers, AnswersChoice, default_answers, default_template
from icl_markup.backbone import Backbone
from icl_markup.backbone_checks import check_lookups
from icl_markup.batching import Batch
from icl_markup.chat import ChatConfig, ChatFrame
from icl_markup.devices import to_device
from icl_markup.episodes import Demo, Episode, Option, Query
from icl_markup.errors import PromptError, nearest
from icl_markup.loading import BackboneConfig
from icl_markup.markup import Markup
from icl_markup.models import DEFAULT
from icl_markup.names import name_scores, name_tokens
from icl_markup.prefixes import PrefixCache
from icl_markup.priors import Prior, PriorChoice, log_probs_of, names_of
from icl_markup.prompt import Prompt
from icl_markup.scoring import QueryScores, score_queries
from icl_markup.tags import Initialisation, Tag, TagTable, initial_rows
from icl_markup.tasks import NONE_OF_THE_ABOVE
from icl_markup.template import Template

if TYPE_CHECKING:
    from icl_markup.push import Pushed
    from icl_markup.tagfile import TagFile


@dataclass(frozen=True)
class Prediction:
    """The answer to one text.

    Attributes:
        text: the text.
        label: the most probable label.
        probabilities: every label's probability, in the order of the options.
        shortened: demonstrations that were shortened so that the prompt fits the backbone.
        dropped: demonstrations that were left out for the same reason.
    """

    text: str
    label: str
    probabilities: dict[str, float]
    shortened: int = 0
    dropped: int = 0


class MarkupModel:
    """Composes prompts with one template and reads the answers of one frozen backbone.

    Args:
        backbone: the frozen model.
        template: the template, or its name or path; ``auto``: the default markup that goes with the answers.
        vectors: the tags' soft tokens by name, each of shape (width, embedding width); tags that it lacks
            (all, by default) are initialised.
        answers: ``symbols``: read the options' letters at the slot; ``names``: score whole label names; ``auto``: what
            the template shows, or with the template ``auto`` what suits the backbone (`default_answers`).
        length_normalised: with ``names``, score by the mean log-probability of a token instead of the sum.
        initialisation: how tags without vectors are initialised.
        seed: seeds that.
        chat: puts every prompt into the chat template of the backbone's tokenizer; a frame that was rendered before
            is used as it is. None: no chat.

    Attributes:
        chat: what stands around a prompt in a chat, or None.
        prefixes: what a causal backbone has computed of prompts, for later prompts that begin alike.
        origin: the tags that were loaded, with the commit, training and ancestry that are known of them; or None.

    Raises:
        TemplateError, PromptError: the template, or the vectors for it, cannot be used.
        BackboneError: a chat is asked for, and the backbone is a masked one or its tokenizer's chat template is
            missing or cannot be used.
    """

    def __init__(
        self,
        backbone: Backbone,
        template: Template | str | Path = AUTO,
        vectors: dict[str, Tensor] | None = None,
        *,
        answers: AnswersChoice = "auto",
        length_normalised: bool = False,
        initialisation: Initialisation = "description",
        seed: int = 0,
        chat: ChatConfig | ChatFrame | None = None,
    ):
        self.backbone = backbone
        self.template, answers = _settled(backbone, template, answers)
        self.length_normalised = length_normalised
        self.prefixes = PrefixCache()
        self.origin: TagFile | None = None
        if isinstance(chat, ChatConfig):
            chat = ChatFrame.of(backbone.tokenizer, chat) if chat.enabled else None
        self.chat = chat
        self.layout = chat.layout(backbone.tokenizer, backbone.encoder, backbone.layout) if chat else backbone.layout
        self.table = _table(backbone, self.template.tags, initialisation, seed) if self.template.tags else None
        if vectors:
            if self.table is None:
                raise PromptError(f"template {self.template.name!r} has no tags to give vectors to")
            self.table.load_vectors(vectors)
        self.markup = self._markup_for(answers)

    @classmethod
    def untrained(
        cls, backbone: str | BackboneConfig = DEFAULT, template: str | Path = AUTO, **options: Any
    ) -> MarkupModel:
        """Load a backbone by folder, hub name or configuration, with fresh tags of `template`.

        Raises:
            BackboneError, TemplateError: either cannot be loaded.
        """
        return cls(Backbone.load(backbone), template, **options)

    @classmethod
    def from_pretrained(
        cls,
        tags: str | Path,
        revision: str | None = None,
        *,
        backbone: Backbone | BackboneConfig | str | None = None,
        token: str | None = None,
    ) -> MarkupModel:
        """Load tags by their name on the hub, or from a folder, which wins where both exist.

        Args:
            tags: ``user/tags``, ``user/tags@revision`` or a folder.
            revision: a commit, tag or branch; a commit pins what is loaded, and is found without the hub once it is in
                the cache. `origin` says which commit was loaded.
            backbone: the model that the tags were made for, where it is not to be loaded by its name.
            token: a token of the hub; None: the one that is logged in with, or ``HF_TOKEN``.

        Raises:
            TagFileError: there are no such tags, they are damaged, or they were made for another backbone.
            BackboneError: the backbone cannot be loaded.
        """
        from icl_markup.tagfile import load_model, read_tags

        named = BackboneConfig(backbone) if isinstance(backbone, str) else backbone
        return load_model(read_tags(tags, revision, token), named)

    @classmethod
    def from_tags(
        cls,
        tags: str | Path | TagFile | Sequence[str | Path | TagFile],
        backbone: Backbone | BackboneConfig | None = None,
        *,
        template: Template | str | Path | None = None,
        rename: Mapping[Any, Any] | None = None,
        only: Sequence[str] | Mapping[Any, Sequence[str]] | None = None,
    ) -> MarkupModel:
        """Load warmed-up tags of one or several files, and the backbone they were made for unless one is given.

        Args:
            tags: a folder, a hub name, a `TagFile`, or a list of them.
            backbone: the backbone or its configuration.
            template: the template to use the tags in; None: that of the files which has exactly their tags.
            rename: new names of tags by old ones; or such mappings by file, as it is named in `tags`.
            only: the tags to take, by their old names; or such lists by file.

        Raises:
            TagFileError: a folder is missing or damaged, the tags were made for another backbone or clash, or what
                else `icl_markup.composition.composed` says.
        """
        from icl_markup.composition import composed
        from icl_markup.tagfile import load_model

        return load_model(composed(tags, template=template, rename=rename, only=only), backbone)

    def save(self, folder: str | Path, training: dict[str, Any] | None = None) -> Path:
        """Write the tags as a folder that `from_tags` loads; see `icl_markup.tagfile`.

        Args:
            folder: where to; an existing tag folder is replaced, atomically.
            training: a JSON-able summary of how the tags were warmed up, for the card; None: what is known of them.

        Raises:
            TagFileError: the template has no tags, or `folder` holds something else.
        """
        from icl_markup.tagfile import save_model

        return save_model(self, folder, training)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Upload the tags with their card to a repository of the hub, which is made if need be.

        Args:
            repo_id: ``user/name``.
            **options: private, revision (a branch), commit_message, token, license, measured, backbone and training;
                see `icl_markup.push.push_tags`.

        Returns:
            The repository, the commit that was made (for ``from_pretrained(..., revision=...)``) and its address.

        Raises:
            TagFileError: the template has no tags, or the hub refuses.
        """
        from icl_markup.push import push_tags
        from icl_markup.tagfile import tags_of

        return push_tags(tags_of(self, options.pop("training", None)), repo_id, **options)

    def __sklearn_clone__(self) -> MarkupModel:
        """Return itself: an estimator that is cloned keeps asking the same frozen model."""
        return self

    @property
    def answers(self) -> Answers:
        """Whether option symbols or whole names are read."""
        return self.markup.answers

    @property
    def prior(self) -> Prior:
        """How the prior of the labels is found unless a caller says otherwise: what a warm-up's validation chose.

        Without one, contextual calibration for names, of which a model favors the common and the short, and none for
        symbols.
        """
        chosen = self.origin.training.get("calibration") if self.origin is not None else None
        if chosen is None:
            chosen = "contextual" if self.answers == "names" else "none"
        return "contextual" if chosen == "contextual" else "none"

    def _markup_for(self, answers: Answers) -> Markup:
        backbone = self.backbone
        return Markup(
            self.template,
            backbone.encoder,
            self.layout,
            self.table,
            answers=answers,
            max_length=backbone.max_length,
        )

    def loss_terms(
        self, prompts: Sequence[Prompt], episodes: Sequence[Episode], all_slots: bool, markup: Markup | None = None
    ) -> SlotScores:
        """Return differentiable scores of every supervised slot of prompts that `markup` (by default ours) composed."""
        markup = markup or self.markup
        if markup.answers == "names":
            found = name_scores(self.backbone, markup, prompts, episodes, self.table)
            means = found.sums / found.lengths
            answers = [slot.answer for prompt in prompts for slot in prompt.slots]
            targets = torch.tensor([-1 if answer is None else answer for answer in answers], device=means.device)
            right = means.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            scores = means if self.length_normalised else found.sums
            return SlotScores(scores, targets, torch.ones_like(targets, dtype=torch.bool), right)
        batch = Batch.of_prompts(prompts, self.pad_id, all_slots=all_slots)
        scores = self.backbone.candidate_logits(batch, self.table)
        return SlotScores(scores, to_device(batch.targets, scores.device), batch.is_query)

    def tokens_of(self, prompts: Sequence[Prompt], episode: Episode) -> int:
        """Return how many tokens are computed for prompts of one episode that are computed together."""
        if self.answers == "names":
            return name_tokens(self.backbone, self.markup, prompts, episode)
        return sum(len(prompt.ids) for prompt in prompts)

    @property
    def pad_id(self) -> int:
        """The id that fills up a batch; masked out, so any ordinary id does where there is no padding token."""
        pad = self.backbone.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @torch.inference_mode()
    def scores(self, episodes: Sequence[Episode], batch_tokens: int = 2048) -> list[list[QueryScores]]:
        """Score the options of every query of every episode, as if each had a prompt of its own.

        Episodes with more options than the tokenizer has symbols are scored by their options' whole names. A causal
        backbone computes what prompts begin with once, for later calls too (`prefixes`): the scores of a call may so
        differ from those of an earlier one by rounding.

        Args:
            episodes: the episodes.
            batch_tokens: the most tokens a batch may hold, padding included.

        Returns:
            For each episode a list with the scores of its queries.

        Raises:
            PromptError: a prompt cannot be composed.
        """
        most = self.markup.most_options
        many = [most is not None and len(episode.options) > most for episode in episodes]
        found: dict[bool, Iterator[list[QueryScores]]] = {}
        for named in sorted(set(many)):
            markup = self._markup_for("names") if named else self.markup
            part = [episode for episode, is_named in zip(episodes, many, strict=True) if is_named == named]
            with self.backbone.lock:  # what is kept of prefixes is one thread's at a time, too
                found[named] = iter(score_queries(self, markup, part, batch_tokens))
        return [next(found[named]) for named in many]

    def classify(
        self,
        texts: Iterable[str],
        labels: Sequence[str] | dict[str, str],
        demos: Iterable[tuple[str, str]] = (),
        *,
        none_of_the_above: bool = False,
        task_description: str = "",
        calibration: PriorChoice = "auto",
        batch_tokens: int = 2048,
    ) -> list[Prediction]:
        """Classify texts, given label names and, optionally, demonstrations; nothing is trained.

        Args:
            texts: the texts to classify.
            labels: label names, or a mapping from names to longer descriptions.
            demos: pairs of text and label.
            none_of_the_above: offer that as a last option.
            task_description: for templates with the field ``{task}``.
            calibration: how the prior of the labels is found, which is divided out (`icl_markup.priors`); ``auto``:
                `prior`.
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
        asked = Episode(episode.options, episode.demos, queries, "", task_description)
        return self.predictions(asked, batch_tokens, calibration)

    def predictions(
        self, episode: Episode, batch_tokens: int = 2048, calibration: PriorChoice = "auto"
    ) -> list[Prediction]:
        """Answer every query of an episode, one `Prediction` each; arguments and errors as in `classify`."""
        prior = self.prior if calibration == "auto" else calibration
        [found] = log_probs_of(self, [episode], prior, batch_tokens)
        names = names_of(episode)
        answers = []
        for i, query in enumerate(episode.queries):
            probabilities = dict(zip(names, np.exp(found.log_probs[i]).tolist(), strict=True))
            label = max(names, key=probabilities.__getitem__)
            answers.append(Prediction(query.text, label, probabilities, found.shortened[i], found.dropped[i]))
        return answers

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
        if none_of_the_above:
            names.append(NONE_OF_THE_ABOVE)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PromptError(f"label {twice!r} is given twice")
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
        right: with names, the mean log-probability of the right name's tokens, (slots,); else None.
    """

    scores: Tensor
    targets: Tensor
    is_query: Tensor
    right: Tensor | None = None

    def loss(self, name_share: float) -> Tensor:
        """Return the loss, summed over the slots whose answer is known.

        It is the cross-entropy over the options, and with names `name_share` times the right name's own loss besides:
        the contrast alone leaves the model free to find all names unlikely.
        """
        contrast = F.cross_entropy(self.scores, self.targets, reduction="sum", ignore_index=-1)
        if self.right is None or not name_share:
            return contrast
        return contrast - name_share * self.right.where(self.targets >= 0, 0.0).sum()


def _settled(backbone: Backbone, template: Template | str | Path, answers: AnswersChoice) -> tuple[Template, Answers]:
    """Return the template and the answers that ``auto`` stands for."""
    if template == AUTO:
        settled = default_answers(backbone.kind, backbone.parameters) if answers == "auto" else answers
        return Template.load(default_template(settled)), settled
    found = template if isinstance(template, Template) else Template.load(template)
    if answers == "auto":
        return found, "symbols" if found.shows_symbols else "names"
    return found, answers


def _table(backbone: Backbone, tags: Sequence[Tag], initialisation: Initialisation, seed: int) -> TagTable:
    check_lookups(backbone)
    rows = initial_rows(
        tags, backbone.embedding, backbone.vocabulary, backbone.encoder.encode, method=initialisation, seed=seed
    )
    return TagTable(tags, rows.to(backbone.device), backbone.first_tag_id)
