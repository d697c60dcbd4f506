"""What a classifier is given: texts, labels and classes, checked, with messages that say which one is at fault."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from icl_markup.chat import ChatConfig
from icl_markup.errors import ConfigError, PromptError
from icl_markup.quantisation import Quantisation
from icl_markup.tasks import NONE_OF_THE_ABOVE
from icl_markup.text import is_encodable

_MOST_CHARACTERS = 32
"""No tokenizer makes a token of more characters than this on average; more of a text need not be read to cut it."""


_CHOICES = {
    "quantisation": get_args(Quantisation),
    "none_of_the_above": (None, "option", "threshold"),
    "calibration": ("auto", "none", "contextual", "domain", "unconditional", "batch"),
}
_LEAST = {"options": 2, "demos": 1, "n_permutations": 1, "most_tokens": 1, "batch_tokens": 1, "cache_bytes": 0}

MOST_ORDERS = 1000
"""More orders of the options than this are a slip: each one costs all prompts once more."""

LONGEST_LABEL = 10_000
"""Characters of the longest label; an array of labels takes as much for each of them."""


def check_parameters(classifier: Any) -> None:
    """Check a classifier's parameters, which scikit-learn sets without looking.

    Raises:
        ConfigError: one has a value that it cannot have.
    """
    for name, choices in _CHOICES.items():
        value = getattr(classifier, name)
        if not (value is None or isinstance(value, str)) or value not in choices:
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")
    for name, least in _LEAST.items():
        value = getattr(classifier, name)
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}: {value!r} is not a whole number of at least {least}")
    if classifier.n_permutations > MOST_ORDERS:
        raise ConfigError(f"n_permutations: {classifier.n_permutations} is more than {MOST_ORDERS}")
    if not isinstance(classifier.template, (str, Path, NoneType)):
        raise ConfigError(f"template: {_shown(classifier.template)}; give a name or a path")
    if not isinstance(classifier.task_description, str) or not is_encodable(classifier.task_description):
        raise ConfigError(f"task_description: {_shown(classifier.task_description)} is no text")
    if not isinstance(classifier.random_state, (int, np.integer)):
        raise ConfigError(f"random_state: {classifier.random_state!r} is not a whole number")
    if classifier.chat is not None and not isinstance(classifier.chat, ChatConfig):
        raise ConfigError(f"chat: {classifier.chat!r} is no ChatConfig; write chat=ChatConfig(enabled=True)")
    if classifier.chat is not None and classifier.chat.enabled and classifier.tags is not None:
        raise ConfigError("chat: tags bring along the chat that they were warmed up in; leave it away")
    _check_descriptions(classifier.descriptions)
    for name in ("threshold", "retriever_weight"):
        value = getattr(classifier, name)
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)
        is_default = value is None if name == "threshold" else isinstance(value, str) and value == "auto"
        if not is_number and not is_default:
            raise ConfigError(f"{name}: {value!r} is not a finite number")


def _check_descriptions(descriptions: Any) -> None:
    if descriptions is None:
        return
    if not isinstance(descriptions, Mapping):
        raise ConfigError(f"descriptions: {_shown(descriptions)}; give a mapping from labels to texts")
    for label, text in descriptions.items():
        if not isinstance(text, str) or not is_encodable(text):
            raise ConfigError(f"descriptions: that of {label!r} is {_shown(text)}, not a text")


def check_described(descriptions: Mapping[Any, str] | None, labels: Sequence[Any]) -> None:
    """Check that no description is lost to a slip of the pen.

    A description may be of a label that is not known yet, or that a fold of a cross-validation lacks; but not of one
    that is written nearly as a label that has none.

    Raises:
        ConfigError: there is such a description.
    """
    described = dict(descriptions or {})
    bare = {str(label): label for label in labels if label not in described}
    for label in described.keys() - set(labels):
        for meant in difflib.get_close_matches(str(label), bare, n=1, cutoff=0.8):
            raise ConfigError(f"descriptions: {label!r} is no label; did you mean {bare[meant]!r}?")


def checked_texts(X: Any, name: str) -> list[str]:
    """Return texts as a list of strings.

    Args:
        X: a list, tuple, array or column of strings, of shape (texts,).
        name: what the argument is called in messages.

    Raises:
        PromptError: it is one string, has another shape, or an item is missing, no string, empty, or no text.
    """
    if isinstance(X, str):
        raise PromptError(f"{name} is one string; give a list of texts")
    if hasattr(X, "toarray"):
        raise PromptError(f"{name} is a sparse matrix of numbers; give a list of texts")
    if hasattr(X, "ndim") and X.ndim != 1:
        raise PromptError(f"{name} has {X.ndim} dimensions; give one text an item, shape (texts,). Reshape your data.")
    try:
        items = list(X)
    except TypeError as error:
        raise PromptError(f"{name} is {type(X).__name__}; give a list of texts") from error
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise PromptError(f"{name}: item {i} is {_shown(item)}, not a text")
        if not item.strip():
            raise PromptError(f"{name}: text {i} is empty")
        if not is_encodable(item):
            raise PromptError(f"{name}: text {i} holds half of a surrogate pair, which is no text; remove it")
    return [str(item) for item in items]


def checked_labels(y: Any, count: int | None, name: str) -> list[Any]:
    """Return labels as a list of plain values.

    Args:
        y: strings, whole numbers or booleans, of shape (labels,).
        count: how many there must be; None: any number.
        name: what the argument is called in messages.

    Raises:
        PromptError: it is one string or None, has another shape or length, or a label is missing or of another type.
    """
    if y is None:
        raise PromptError(f"{name} is None; this classifier requires {name} to be passed, but the target y is None")
    if isinstance(y, str):
        raise PromptError(f"{name} is one string; give a list of labels")
    if hasattr(y, "ndim") and y.ndim == 2 and y.shape[1] == 1:
        y = np.asarray(y)[:, 0]
    if hasattr(y, "ndim") and y.ndim != 1:
        raise PromptError(f"{name} has {y.ndim} dimensions; give one label a text, shape (texts,)")
    try:
        labels = [_plain(item) for item in list(y)]
    except TypeError as error:
        raise PromptError(f"{name} is {type(y).__name__}; give a list of labels") from error
    if count is not None and len(labels) != count:
        raise PromptError(
            f"{name} has {len(labels)} labels for {count} texts; their numbers of samples are inconsistent"
        )
    for i, label in enumerate(labels):
        if not isinstance(label, (str, int)):
            raise PromptError(f"{name}: label {i} is {_shown(label)}; labels are strings or whole numbers")
        if isinstance(label, str) and not label.strip():
            raise PromptError(f"{name}: label {i} is empty")
        if isinstance(label, str) and not is_encodable(label):
            raise PromptError(f"{name}: label {i} holds half of a surrogate pair, which is no text; rename it")
        if isinstance(label, str) and "\0" in label:
            raise PromptError(f"{name}: label {i} holds the character NUL, which NumPy drops at an end; rename it")
    return labels


def distinct_classes(labels: Sequence[Any], with_none: bool) -> NDArray[Any]:
    """Return the distinct labels, sorted, and "none of the above" among them where it can be answered.

    Raises:
        PromptError: labels are of several types, two are written alike, or one is "none of the above"; or they are no
            strings where that can be answered.
    """
    types = {type(label) for label in labels}
    if len(types) > 1:
        raise PromptError(f"labels are of types {', '.join(sorted(t.__name__ for t in types))}; give them all as one")
    if with_none and types - {str}:
        raise PromptError(
            f"labels are of type {types.pop().__name__}, but the answer {NONE_OF_THE_ABOVE!r} is a string, and "
            "scikit-learn's metrics take one type: give labels as strings, or leave none_of_the_above away"
        )
    distinct = sorted(set(labels))
    written: dict[str, Any] = {}
    for label in distinct:
        text = shown_name(label)
        if len(text) > LONGEST_LABEL:
            raise PromptError(f"label {text[:40]!r}… has {len(text):,} characters, of at most {LONGEST_LABEL:,}")
        if text in written:
            raise PromptError(f"labels {written[text]!r} and {label!r} are written alike; rename one")
        written[text] = label
        if text == NONE_OF_THE_ABOVE:
            raise PromptError(
                f"label {label!r} has a meaning of its own: leave such texts out of the demonstrations, set "
                "none_of_the_above, and give them to calibrate"
            )
    return np.array(sorted([*distinct, *([NONE_OF_THE_ABOVE] if with_none else [])]))


def shown_name(label: Any) -> str:
    """Return a label as prompts show it: underscores, by which words of labels are often joined, are spaces there."""
    return (str(label).replace("_", " ").strip() or str(label)).strip()


def _plain(label: Any) -> Any:
    if isinstance(label, np.generic):
        label = label.item()
    return int(label) if isinstance(label, float) and label.is_integer() else label


def cut_text(text: str, most: int, encode: Callable[[str], Sequence[int]]) -> str:
    """Return the longest beginning of a text that has at most so many tokens.

    Args:
        text: the text.
        most: the most tokens.
        encode: text to token ids.
    """
    text = text.strip()[: most * _MOST_CHARACTERS]
    if len(encode(text)) <= most:
        return text
    low, high = 1, len(text)  # text[:low] fits, text[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if len(encode(text[:middle])) <= most:
            low = middle
        else:
            high = middle
    return text[:low] if text[:low].strip() else text[:high]


def _shown(item: Any) -> str:
    if item is None or (isinstance(item, (float, np.floating)) and np.isnan(item)):
        return "missing (NaN or None)"
    return f"{str(item)[:40]!r} of type {type(item).__name__}"
