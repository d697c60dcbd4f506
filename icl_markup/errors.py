"""The errors of this package: each carries one message that names the input at fault and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MarkupError(ValueError):
    """Base of every error that bad input can raise; catching it catches them all."""


class TemplateError(MarkupError):
    """A template file is malformed; the message starts with ``file:line:column``."""


class TaskError(MarkupError):
    """A task's file or its content is unusable; the message names file and line."""


class PromptError(MarkupError):
    """A prompt cannot be composed: it is too long, or an argument is empty or out of range."""


class BackboneError(MarkupError):
    """A model or tokenizer cannot serve as a backbone."""


class TagFileError(MarkupError):
    """A tag folder is missing, damaged, or was made for another backbone."""


class ExportError(MarkupError):
    """Tags cannot be written in another tool's format, or what was written does not answer as the model does."""


class ConfigError(MarkupError):
    """A configuration holds an unknown key or a value of the wrong type or range."""


class WarmupError(MarkupError):
    """A warm-up cannot start, continue or go on; what was already computed is kept on disk."""


class Interrupted(WarmupError):
    """A warm-up was told to stop and has saved where it stood."""


class EvaluationError(MarkupError):
    """Measurements cannot give the statistic asked for: shapes differ, a value is not finite, or a class is missing."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
