"""`MarkupClassifier`: a scikit-learn estimator that classifies texts from label names and a few examples.

Nothing is trained by `fit`: it stores demonstrations, and prompts composed of warmed-up tags ask a frozen model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import Tags

from icl_markup.asking import Asker
from icl_markup.calibration import Calibration, out_of_scope, shifted, with_rejection
from icl_markup.chat import ChatConfig
from icl_markup.classifier_input import (
    check_described,
    check_parameters,
    checked_labels,
    checked_texts,
    cut_text,
    distinct_classes,
    shown_name,
)
from icl_markup.episodes import Demo, Option
from icl_markup.errors import ConfigError, PromptError, nearest
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from icl_markup.prefixes import MOST_BYTES
from icl_markup.priors import Prior
from icl_markup.prompt import Prompt
from icl_markup.quantisation import Quantisation
from icl_markup.retrievers import Retriever, retriever_named
from icl_markup.shared import load_shared
from icl_markup.tasks import NONE_OF_THE_ABOVE

Floats = NDArray[np.float64]
CHUNK = 256
"""Texts that are asked together: memory does not grow with the number of texts."""

_LATER = ("threshold", "batch_tokens", "cache_bytes")
"""Parameters that may be changed after `fit`."""

UNSURE = 0.5
"""Without a threshold, ``none_of_the_above="threshold"`` rejects a text whose best label is less likely than this."""


class MarkupClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies texts with a frozen language model, label names, and any number of demonstrations.

    Where labels and demonstrations do not fit one prompt, a retriever chooses for each text what its prompt shows;
    labels that it leaves out have probability 0.

    Args:
        tags: warmed-up tags, which name their backbone: a folder, or a name on the hub (``user/tags``, or
            ``user/tags@revision``, where a commit pins them); a list of them, whose tags are used together; a
            `MarkupModel`; or None for the backbone with untrained tags of `template`.
        backbone: a transformers folder or hub name; None: the tags' own, or SmolLM2.
        template: the template; None: that of the tags, or the default markup if there are none.
        chat: the model's chat template around prompts, where no tags are given; tags bring theirs along.
        descriptions: longer descriptions of labels, by label; used by templates with ``{description}``.
        task_description: for templates with the field ``{task}``.
        none_of_the_above: None: every text gets a label; ``option``: the last option of every prompt; ``threshold``:
            the answer where no label is likely enough. In both cases "none of the above" is one of `classes_`.
        threshold: a text is rejected if its out-of-scope score lies above this: with ``option``, the log-probability of
            "none of the above" minus the best label's (default 0); with ``threshold``, minus the best label's
            log-probability (default log 2).
            None: the default, or what `calibrate` chose.
        retriever: ``backbone`` (mean hidden states of the backbone), ``bm25``, ``embedding`` (sentence-transformers),
            or a function from queries and texts to similarities of shape (queries, texts).
        encoder: the sentence encoder of ``embedding``; None: all-MiniLM-L6-v2.
        retriever_weight: how much the retriever's similarity counts beside the prompt's answer, where it chooses
            options: its multiple of similarity / 0.05 is added to the logits, a scale made for cosines (scores of
            BM25 are some 20 times larger); ``auto``: 1 for the cosines of ``backbone`` and ``embedding``, else 0.
        options: labels a prompt, where they are chosen.
        demos: demonstrations a prompt, where they are chosen.
        calibration: ``none``; ``contextual``, ``domain`` or ``unconditional``: by a prior that the model is asked for
            (`icl_markup.priors`); ``auto``: one of these, as the tags have it (`MarkupModel.prior`); ``batch``: by the
            mean over texts given to `calibrate` (Zhou et al. 2024).
        n_permutations: orders of the options over which probabilities are averaged, against position bias.
        most_tokens: a text with more tokens is cut to so many.
        batch_tokens: the most tokens of one forward pass, padding included.
        cache_bytes: the most bytes of keys and values of prompts' beginnings that a causal backbone keeps for later
            calls, those of all classifiers on the same tags together.
        device: ``auto``, ``cpu``, ``cuda`` …
        quantisation: how the backbone is quantised, as in `BackboneConfig`; ``auto``: as tags or checkpoint say.
        random_state: seeds the orders of options, and untrained tags.

    Attributes:
        classes_: the labels, and "none of the above" where it can be answered, sorted, as scikit-learn's scorers take
            for granted; shape (classes,).
        texts_: the texts of the demonstrations.
        labels_: the position of each one's label in `labels()`.
        calibration_: what `calibrate` learnt.
    """

    def __init__(
        self,
        tags: str | Path | Sequence[str | Path] | MarkupModel | None = None,
        *,
        backbone: str | None = None,
        template: str | None = None,
        chat: ChatConfig | None = None,
        descriptions: Mapping[Any, str] | None = None,
        task_description: str = "",
        none_of_the_above: Literal["option", "threshold"] | None = None,
        threshold: float | None = None,
        retriever: str | Retriever = "backbone",
        encoder: str | None = None,
        retriever_weight: float | Literal["auto"] = "auto",
        options: int = 10,
        demos: int = 20,
        calibration: Literal["auto", "none", "contextual", "domain", "unconditional", "batch"] = "auto",
        n_permutations: int = 1,
        most_tokens: int = 256,
        batch_tokens: int = 4096,
        cache_bytes: int = MOST_BYTES,
        device: str = "auto",
        quantisation: Quantisation = "auto",
        random_state: int = 0,
    ):
        self.tags = tags
        self.backbone = backbone
        self.template = template
        self.chat = chat
        self.descriptions = descriptions
        self.task_description = task_description
        self.none_of_the_above = none_of_the_above
        self.threshold = threshold
        self.retriever = retriever
        self.encoder = encoder
        self.retriever_weight = retriever_weight
        self.options = options
        self.demos = demos
        self.calibration = calibration
        self.n_permutations = n_permutations
        self.most_tokens = most_tokens
        self.batch_tokens = batch_tokens
        self.cache_bytes = cache_bytes
        self.device = device
        self.quantisation = quantisation
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, *, classes: Sequence[Any] = ()) -> MarkupClassifier:
        """Store demonstrations; nothing is trained, and an earlier calibration is forgotten.

        Args:
            X: texts, shape (demonstrations,).
            y: their labels, of the same shape.
            classes: further labels, known by their names alone.

        Raises:
            MarkupError: a text or label is empty or missing, fewer than two options are left, a label's
                name is too long for the backbone, or the backbone or tags cannot be loaded.
        """
        check_parameters(self)
        texts = checked_texts(X, "X")
        labels = checked_labels(y, len(texts), "y")
        return self._store(texts, labels, [*checked_labels(classes, None, "classes")], Calibration())

    def partial_fit(
        self, X: ArrayLike = (), y: ArrayLike = (), classes: Sequence[Any] = (), *, remove: Sequence[Any] = ()
    ) -> MarkupClassifier:
        """Add demonstrations and labels, and remove labels with their demonstrations; a calibration is kept.

        `descriptions` may have been changed before; of all other parameters `fit` has the last word.

        Args:
            X: texts of demonstrations to add, as in `fit`.
            y: their labels.
            classes: labels to add by name alone.
            remove: labels to remove first; each must be known.

        Raises:
            MarkupError: as in `fit`, or a label to remove is not known. The classifier is then as it was.
        """
        check_parameters(self)
        if hasattr(self, "classes_"):
            self._fitted(but=("descriptions",))
        texts = checked_texts(X, "X")
        labels = checked_labels(y, len(texts), "y")
        added = checked_labels(classes, None, "classes")
        if not hasattr(self, "classes_"):
            if len(remove):
                raise PromptError("remove: the classifier has no labels yet")
            return self._store(texts, labels, added, Calibration())
        known = self.labels()
        for label in remove:
            if label not in known:
                raise PromptError(f"remove: {label!r} is not one of the labels")
        gone = set(remove)
        kept = [i for i, c in enumerate(self.labels_) if known[c] not in gone]
        return self._store(
            [*(self.texts_[i] for i in kept), *texts],
            [*(known[self.labels_[i]] for i in kept), *labels],
            [*(label for label in known if label not in gone), *added],
            self.calibration_,
        )

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the label of each text, shape (texts,); errors as in `predict_proba`."""
        best = self._log_probs(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return the probability of each of `classes_` for each text, shape (texts, classes).

        Raises:
            MarkupError: a text is empty, missing, or no text; the message names it.
            NotFittedError: `fit` was not called.
        """
        return np.asarray(np.exp(self._log_probs(X)))

    def predict_log_proba(self, X: ArrayLike) -> Floats:
        """Return the logarithm of what `predict_proba` returns, shape (texts, classes)."""
        return self._log_probs(X)

    def calibrate(self, X: ArrayLike, y: ArrayLike | None = None) -> MarkupClassifier:
        """Learn from texts that are no demonstrations: the prior without labels; temperature and threshold with them.

        Args:
            X: texts, shape (texts,).
            y: their labels; "none of the above" for texts that no label fits. None: they are not known.

        Raises:
            MarkupError: as in `predict_proba`, or a label is unknown, or there is nothing to learn: neither
                ``calibration="batch"`` nor labels.
        """
        self._fitted()
        texts = checked_texts(X, "X")
        if y is None and self.calibration != "batch":
            raise ConfigError("calibrate: without labels there is a prior to learn only with calibration='batch'")
        answers = None if y is None else self._answers(y, len(texts), "calibrate")
        if not texts or (answers is not None and (answers < 0).all()):
            raise PromptError("calibrate: no text with one of the labels to learn from; give some")
        names = self._names()
        raw = self._raw(texts)
        found = Calibration()
        if self.calibration == "batch":
            found = found.with_prior(raw, names)
        if answers is not None:
            found = self._with_labels(found, found.applied(raw, names), answers)
        self.calibration_: Calibration = found
        return self

    def _answers(self, y: ArrayLike, count: int, place: str) -> NDArray[np.intp]:
        """Return the positions of labels, -1 for "none of the above"."""
        known = {label: i for i, label in enumerate(self.labels())} | {NONE_OF_THE_ABOVE: -1}
        labels = checked_labels(y, count, "y")
        for i, label in enumerate(labels):
            if label not in known:
                raise PromptError(
                    f"{place}: label {i}, {label!r}, is not one of the labels{nearest(str(label), map(str, known))}"
                )
        return np.array([known[label] for label in labels], dtype=np.intp)

    def _with_labels(self, found: Calibration, scores: Floats, answers: NDArray[np.intp]) -> Calibration:
        inside = len(self.labels())
        is_out = answers < 0
        if not is_out.all():
            usable = ~is_out if self.none_of_the_above != "option" else np.ones(len(answers), dtype=bool)
            found = found.with_temperature(scores[usable], np.where(is_out, inside, answers)[usable])
        scores = log_softmax(scores / found.temperature, axis=1)
        if self.none_of_the_above and self.threshold is None and is_out.any() and not is_out.all():
            right = scores[:, :inside].argmax(axis=1) == answers
            found = found.with_threshold(out_of_scope(scores, inside), right, is_out)
        return found

    def retriever_recall(self, X: ArrayLike, y: ArrayLike) -> float:
        """Return the share of texts whose label the retriever offers; it bounds the accuracy. 1 without retrieval.

        Texts labelled "none of the above" are passed over; errors as in `calibrate`.
        """
        self._fitted()
        texts = checked_texts(X, "X")
        answers = self._answers(y, len(texts), "retriever_recall").tolist()
        pairs = [(text, answer) for text, answer in zip(texts, answers, strict=True) if answer >= 0]
        return self._asker_().recall([text for text, _ in pairs], [answer for _, answer in pairs])

    def compose(self, text: str) -> tuple[Prompt, list[str]]:
        """Return the prompt that a text is asked with, and the names of its options in their order."""
        self._fitted()
        asker = self._asker_()
        [text] = self._cut(checked_texts([text], "text"), asker.model, asker)
        _, asked = next(asker.asked([text]))
        return asker.model.markup.compose(asked.episode), [option.name for option in asked.episode.options]

    def save(self, folder: str | Path) -> Path:
        """Write tags, demonstrations, calibration and the backbone's name as a folder; see `classifier_file`.

        Raises:
            ConfigError: the retriever is a function, which is no data.
            TagFileError: the folder cannot be written.
        """
        from icl_markup.classifier_file import save_classifier

        self._fitted()
        return save_classifier(self, folder)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        batch_tokens: int | None = None,
        quantisation: Quantisation = "auto",
    ) -> MarkupClassifier:
        """Read a folder that `save` wrote.

        Args:
            folder: the folder.
            device: ``auto``, ``cpu``, ``cuda`` …
            batch_tokens: the most tokens of one forward pass; None: as it was saved.
            quantisation: how the backbone is quantised; ``auto``: as it was saved.

        Raises:
            TagFileError: the folder is missing, damaged or of a later format, or its tags do not fit the backbone.
        """
        from icl_markup.classifier_file import load_classifier

        return load_classifier(folder, device, batch_tokens, quantisation)

    def fitted_model(self) -> MarkupModel:
        """Return the model that answers; shared by classifiers with the same tags and backbone."""
        self._fitted()
        return self._asker_().model

    def _load(self) -> MarkupModel:
        if isinstance(self.tags, MarkupModel):
            return self.tags
        config = None
        if self.backbone is not None or self.device != "auto" or self.quantisation != "auto":
            config = BackboneConfig(self.backbone or "", device=self.device, quantisation=self.quantisation)
        return load_shared(self.tags, config, self.template, self.random_state, self.chat)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_asker", None)  # holds the model, which is loaded again where the classifier is unpickled
        return state

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.target_tags.required = True
        return tags

    def _store(
        self, texts: list[str], labels: list[Any], others: Iterable[Any], calibration: Calibration
    ) -> MarkupClassifier:
        classes = distinct_classes([*labels, *others], self.none_of_the_above is not None)
        inside = self._inside(classes)
        check_described(self.descriptions, inside)
        position = {label: i for i, label in enumerate(inside)}
        demos = [position[label] for label in labels]
        asker = self._new_asker(inside, texts, demos)
        asker.check()
        self.classes_ = classes
        self.texts_ = texts
        self.labels_ = demos
        self.calibration_ = calibration
        self._asker = asker
        self._given = self._settings()
        return self

    def _settings(self) -> dict[str, Any]:
        """Return the parameters that what was fitted depends on."""
        found = {name: value for name, value in self.get_params(deep=False).items() if name not in _LATER}
        if "descriptions" in found:  # a mapping may be changed in place
            found["descriptions"] = dict(found["descriptions"] or {})
        return found

    def _inside(self, classes: NDArray[Any]) -> list[Any]:
        """Return the labels among the classes: all but "none of the above", where that can be answered."""
        return [label for label in classes.tolist() if self.none_of_the_above is None or label != NONE_OF_THE_ABOVE]

    def _new_asker(self, inside: Sequence[Any], texts: Sequence[str], answers: Sequence[int]) -> Asker:
        model = self._load()
        descriptions = dict(self.descriptions or {})
        weight = self.retriever_weight
        if weight == "auto":
            weight = 1.0 if self.retriever in ("backbone", "embedding") else 0.0
        shown = self._cut(texts, model)
        return Asker(
            model,
            tuple(Option(shown_name(label), descriptions.get(label, "")) for label in inside),
            tuple(Demo(text, answer) for text, answer in zip(shown, answers, strict=True)),
            self._retriever(model),
            offers_none=self.none_of_the_above == "option",
            options=self.options,
            most_demos=self.demos,
            weight=float(weight),
            n_permutations=self.n_permutations,
            prior=self._prior(model),
            seed=self.random_state,
            task_description=self.task_description,
        )

    def _prior(self, model: MarkupModel) -> Prior:
        if self.calibration == "auto":
            return model.prior
        return "none" if self.calibration == "batch" else self.calibration

    def _retriever(self, model: MarkupModel) -> Retriever:
        """Return the retriever of before, which has read its texts, unless it would be another one now."""
        before: Asker | None = getattr(self, "_asker", None)
        if before is not None and before.model is model and not self._changed("retriever", "encoder"):
            return before.retriever
        return retriever_named(self.retriever, model.backbone, self.encoder, self.batch_tokens)

    def _changed(self, *names: str) -> list[str]:
        """Return which of these parameters are no longer those of `fit`."""
        given = self._given
        return [
            name
            for name, value in self._settings().items()
            if name in names and value is not given[name] and value != given[name]
        ]

    def _asker_(self) -> Asker:
        if getattr(self, "_asker", None) is None:  # unpickled
            self._asker = self._new_asker(self.labels(), self.texts_, self.labels_)
        return self._asker

    def _fitted(self, but: Sequence[str] = ()) -> None:
        if not hasattr(self, "classes_"):
            raise NotFittedError("this MarkupClassifier has no labels yet; call fit first")
        for name in self._changed(*(self._settings().keys() - set(but))):
            raise ConfigError(
                f"{name} was changed after fit, from {self._given[name]!r} to {getattr(self, name)!r}; call fit again"
            )

    def labels(self) -> list[Any]:
        """Return the labels without "none of the above"."""
        return self._inside(self.classes_)

    def _names(self) -> list[str]:
        return [option.name for option in self._asker_().whole.options]

    def _cut(self, texts: Sequence[str], model: MarkupModel, asker: Asker | None = None) -> list[str]:
        encode = model.backbone.encoder.encode
        most = self.most_tokens if asker is None else min(self.most_tokens, asker.most_tokens)
        return [cut_text(text, most, encode) for text in texts]

    def _raw(self, texts: Sequence[str]) -> Floats:
        asker = self._asker_()
        chunks = (self._cut(texts[i : i + CHUNK], asker.model, asker) for i in range(0, len(texts), CHUNK))
        asker.model.prefixes.most_bytes = self.cache_bytes
        parts = [asker.log_probs(chunk, self.batch_tokens) for chunk in chunks]
        return np.concatenate(parts) if parts else np.empty((0, len(self._names())))

    def _log_probs(self, X: ArrayLike) -> Floats:
        self._fitted()
        scores = self.calibration_.applied(self._raw(checked_texts(X, "X")), self._names())
        threshold = self.threshold if self.threshold is not None else self.calibration_.threshold
        if self.none_of_the_above is None:
            return scores
        if self.none_of_the_above == "option":
            scores = shifted(scores, 0.0 if threshold is None else threshold)
        else:
            scores = with_rejection(scores, -np.log(UNSURE) if threshold is None else threshold)
        place = self.classes_.tolist().index(NONE_OF_THE_ABOVE)
        return np.insert(scores[:, :-1], place, scores[:, -1], axis=1)
