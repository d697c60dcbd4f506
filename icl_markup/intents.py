"""Changes of a classifier's labels and examples while it serves, each made whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from icl_markup.classifier import MarkupClassifier
from icl_markup.classifier_input import checked_texts
from icl_markup.errors import PromptError, TagFileError
from icl_markup.text import is_encodable

MOST_LABELS = 5_000
MOST_EXAMPLES = 50_000
"""A server's labels and examples do not grow beyond these; a classifier that has more when loaded keeps them."""


class UnknownLabelError(PromptError):
    """A label is not one of the classifier's."""


class NotSavedError(RuntimeError):
    """A changed classifier could not be written; the change was taken back."""


class IntentRow(TypedDict):
    """A label with its examples, in the order in which they were given."""

    label: str
    description: str
    examples: list[str]


class Intents:
    """Labels and examples of a fitted classifier, by the labels' written form.

    Not safe beside a prediction of the same classifier: call it where predictions are made.

    Args:
        classifier: the classifier, which is changed.
        folder: where it is written after each change; None: changes live in memory.
    """

    def __init__(self, classifier: MarkupClassifier, folder: str | Path | None = None):
        self._classifier = classifier
        self._folder = folder

    def rows(self) -> list[IntentRow]:
        """Return every label with its description and examples, sorted by label."""
        labels = self._classifier.labels()
        descriptions = self._classifier.descriptions or {}
        examples: list[list[str]] = [[] for _ in labels]
        for text, answer in zip(self._classifier.texts_, self._classifier.labels_, strict=True):
            examples[answer].append(text)
        return [
            {"label": str(label), "description": str(descriptions.get(label, "")), "examples": own}
            for label, own in zip(labels, examples, strict=True)
        ]

    def row(self, name: str) -> IntentRow:
        """Return one label with its description and examples.

        Raises:
            UnknownLabelError: it is not known.
        """
        label = str(self._known(name))
        return next(row for row in self.rows() if row["label"] == label)

    def put(
        self, name: str, examples: Sequence[str], description: str | None = None, *, replace: bool = False
    ) -> IntentRow:
        """Add a label, or examples to a label, and return it; an example that the label already has is passed over.

        Args:
            name: the label; spaces around it are no part of it.
            examples: texts.
            description: None: as it was.
            replace: the examples replace those that the label had.

        Raises:
            MarkupError: the label or an example is empty or no text, the label is too long for a prompt or is
                "none of the above", or there are too many.
            NotSavedError: the folder cannot be written.
        """
        texts = checked_texts(list(dict.fromkeys(examples)), "examples")
        if description is not None and not is_encodable(description):
            raise PromptError("description: holds half of a surrogate pair, which is no text; remove it")
        try:
            label = self._known(name)
            is_new = False
        except UnknownLabelError:
            label = self._typed(name.strip())
            is_new = True
        had = [] if is_new else self.row(name)["examples"]
        if not replace:
            texts = [text for text in texts if text not in set(had)]
        total = len(self._classifier.texts_) + len(texts) - (len(had) if replace else 0)
        if is_new and len(self._classifier.labels()) >= MOST_LABELS:
            raise PromptError(f"there are {MOST_LABELS:,} labels or more; remove one first")
        if total > MOST_EXAMPLES and texts:
            raise PromptError(f"there would be {total:,} examples, of at most {MOST_EXAMPLES:,}; remove some first")

        def change() -> None:
            if description is not None:
                self._describe(label, description)
            remove = [label] if replace and not is_new else []
            self._classifier.partial_fit(texts, [label] * len(texts), [label], remove=remove)

        self._change(change)
        return self.row(name)

    def remove(self, name: str) -> None:
        """Remove a label with its examples.

        Raises:
            UnknownLabelError: it is not known.
            MarkupError: fewer than two options would be left.
            NotSavedError: the folder cannot be written.
        """
        label = self._known(name)

        def change() -> None:
            self._describe(label, "")
            self._classifier.partial_fit(remove=[label])

        self._change(change)

    def _known(self, name: str) -> Any:
        for label in self._classifier.labels():
            if str(label).strip() == name.strip():
                return label
        raise UnknownLabelError(f"label {name[:80]!r} is not known")

    def _typed(self, name: str) -> Any:
        """Return a new label with the type of those that are there: one array holds them all."""
        labels = self._classifier.labels()
        if all(isinstance(label, str) for label in labels):
            return name
        if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
            try:
                return int(name)
            except ValueError:
                raise PromptError(f"label {name[:80]!r}: the labels are whole numbers; give one") from None
        raise PromptError(f"label {name[:80]!r}: labels that are not strings cannot be joined by another")

    def _describe(self, label: Any, description: str) -> None:
        others = {key: value for key, value in (self._classifier.descriptions or {}).items() if key != label}
        self._classifier.descriptions = others | ({label: description} if description else {}) or None

    def _change(self, change: Callable[[], None]) -> None:
        # Every attribute is replaced by a change and none altered in place, so that a shallow copy takes it back.
        before = dict(self._classifier.__dict__)
        try:
            change()
            if self._folder is not None:
                self._classifier.save(self._folder)
        except BaseException as error:
            self._classifier.__dict__.update(before)
            if isinstance(error, TagFileError):
                raise NotSavedError(f"nothing was changed, as it cannot be written: {error}") from error
            raise
