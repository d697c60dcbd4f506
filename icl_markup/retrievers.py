"""Retrievers: how alike queries and stored texts are, by words, by sentence embeddings, or by the backbone itself.

A retriever is any function from queries and stored texts to their similarities. The ones here keep what they computed
of the stored texts as long as these are asked for, so that a text that is added later costs itself alone; they keep
nothing of the queries, of which there may be any number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from icl_markup.backbone import Backbone
from icl_markup.batching import cut_by_length
from icl_markup.errors import ConfigError, PromptError, nearest
from icl_markup.sentences import MINILM, SentenceEncoder, shared_encoder

Floats = NDArray[np.float32]
Known = Literal["backbone", "bm25", "embedding"]
KNOWN: tuple[Known, ...] = ("backbone", "bm25", "embedding")


_LOCK = RLock()
"""Held while a sentence encoder runs: its tokenizer is one thread's at a time."""


class Retriever(Protocol):
    """Says how alike queries and stored texts are."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> NDArray[Any]:
        """Return similarities of shape (queries, texts), the larger the more alike."""
        ...


class Vectors:
    """The vectors of some texts; of other texts asked for next, only those that are new are computed.

    Args:
        compute: from texts (n,) to vectors (n, width), whatever they are computed together with.
    """

    def __init__(self, compute: Callable[[Sequence[str]], NDArray[Any]]):
        self._compute = compute
        self._kept: dict[str, NDArray[Any]] = {}

    def of(self, texts: Sequence[str]) -> Floats:
        """Return vectors of shape (texts, width), and forget texts that are not asked for now."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        self._kept.update(zip(new, self._compute(new) if new else (), strict=True))
        self._kept = {text: self._kept[text] for text in dict.fromkeys(texts)}
        return np.asarray(np.stack([self._kept[text] for text in texts]), dtype=np.float32)


class EmbeddingRetriever:
    """Cosine of sentence embeddings.

    Args:
        encoder: a sentence encoder, or the name of one (`icl_markup.sentences`), which is loaded once it is needed and
            shared with others that name it.
    """

    def __init__(self, encoder: SentenceEncoder | str = MINILM):
        self._encoder = encoder
        self._kept: tuple[tuple[str, ...], Floats] | None = None
        self._vectors = Vectors(self._computed)

    @property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder.

        Raises:
            BackboneError: it cannot be loaded.
        """
        if isinstance(self._encoder, str):
            self._encoder = shared_encoder(self._encoder)
        return self._encoder

    def __sklearn_clone__(self) -> EmbeddingRetriever:
        """Return itself: an estimator that is cloned keeps using the same frozen encoder."""
        return self

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """Return cosines of shape (queries, texts)."""
        with _LOCK:
            return self.encoder.compute(queries) @ self._stored(tuple(texts)).T

    def _computed(self, texts: Sequence[str]) -> Floats:
        return self.encoder.compute(texts)

    def _stored(self, texts: tuple[str, ...]) -> Floats:
        if self._kept is None or self._kept[0] != texts:
            self._kept = texts, self._vectors.of(texts)
        return self._kept[1]


class BackboneRetriever(EmbeddingRetriever):
    """Cosine of mean hidden states of the backbone itself: it needs no other model.

    The states are the last ones, of the encoder if there is one. Their mean over the stored texts is subtracted:
    hidden states of language models share a large common part (Mu & Viswanath 2018, "All-but-the-Top").

    Args:
        backbone: the frozen model.
        batch_tokens: the most tokens of one forward pass, padding included.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int = 4096):
        self.backbone = backbone
        self.batch_tokens = batch_tokens
        self._kept = None
        self._vectors = Vectors(self._states)
        self._mean: Floats = np.zeros(1, dtype=np.float32)

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """Return cosines of shape (queries, texts)."""
        with self.backbone.lock:
            stored = self._stored(tuple(texts))
            return _unit(self._states(queries) - self._mean) @ stored.T

    def _stored(self, texts: tuple[str, ...]) -> Floats:
        if self._kept is None or self._kept[0] != texts:
            states = self._vectors.of(texts)
            self._mean = states.mean(axis=0)
            self._kept = texts, _unit(states - self._mean)
        return self._kept[1]

    @torch.inference_mode()
    def _states(self, texts: Sequence[str]) -> Floats:
        """Return the mean hidden state of each text, (texts, hidden width)."""
        backbone = self.backbone
        layout, pad = backbone.layout, backbone.tokenizer.pad_token_id or 0
        room = backbone.max_length - len(layout.prefix) - len(layout.suffix)
        lines = [[*layout.prefix, *backbone.encoder.encode(text)[:room], *layout.suffix] for text in texts]
        found: dict[int, NDArray[Any]] = {}
        for group in cut_by_length([len(line) for line in lines], self.batch_tokens):
            longest = max(len(lines[i]) for i in group)
            ids = torch.full((len(group), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):
                ids[row, : len(lines[i])] = torch.tensor(lines[i])
                mask[row, : len(lines[i])] = 1
            states = backbone.text_states(ids, mask).float().cpu()
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found.update(zip(group, means.numpy(), strict=True))
        return np.stack([found[i] for i in range(len(texts))]).astype(np.float32)


class Bm25Retriever:
    """BM25 over words (Robertson et al. 1995), by the package ``bm25s`` (Lù 2024).

    A word is a run of letters and digits of any script; in scripts without spaces, a pair of neighbouring characters.
    """

    def __init__(self) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(f'retriever bm25 needs bm25s: pip install "icl-markup[retrieval]" ({error})') from error
        self._package = bm25s
        self._kept: tuple[tuple[str, ...], Any] | None = None

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """Return BM25 scores of shape (queries, texts); 0 where no word is shared."""
        index = self._index(tuple(texts))
        scores = np.zeros((len(queries), len(texts)), dtype=np.float32)
        for row, query in enumerate(queries):
            known = [word for word in words(query) if word in index.vocab_dict]
            if known:
                scores[row] = index.get_scores(known)
        return scores

    def _index(self, texts: tuple[str, ...]) -> Any:
        if self._kept is None or self._kept[0] != texts:
            index = self._package.BM25()
            # A word that no text has keeps an index of nothing but empty texts from failing.
            index.index([words(text) or [""] for text in texts], show_progress=False)
            self._kept = texts, index
        return self._kept[1]


def words(text: str) -> list[str]:
    """Return the words of a text, folded for comparison: BM25's terms."""
    found: list[str] = []
    for run in _runs(text):
        if _is_spaceless(run[0]) and len(run) > 1:
            found += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            found.append(run)
    return found


def _runs(text: str) -> list[str]:
    runs: list[str] = []
    last = None
    for character in unicodedata.normalize("NFKC", text).casefold():
        if last is not None and unicodedata.category(character).startswith("M"):
            runs[-1] += character  # a vowel sign or an accent belongs to the letter before it
            continue
        kind = _is_spaceless(character) if character.isalnum() else None
        if kind is None:
            last = None
            continue
        if kind == last:
            runs[-1] += character
        else:
            runs.append(character)
        last = kind
    return runs


def _is_spaceless(character: str) -> bool:
    """Whether a character's script puts no spaces between words: Chinese, Japanese, Thai, Lao, Khmer."""
    code = ord(character)
    return 0x0E00 <= code < 0x0F00 or 0x1780 <= code < 0x1800 or 0x3040 <= code < 0xA000 or 0x20000 <= code < 0x32000


def _unit(vectors: NDArray[Any]) -> Floats:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)


def retriever_named(name: str | Retriever, backbone: Backbone, encoder: str | None, batch_tokens: int) -> Retriever:
    """Return the retriever of a name, or the function itself.

    Args:
        name: ``backbone``, ``bm25``, ``embedding``, or a function from queries and texts to similarities.
        backbone: what ``backbone`` embeds with.
        encoder: the sentence encoder of ``embedding``; None: all-MiniLM-L6-v2.
        batch_tokens: the most tokens of one forward pass.

    Raises:
        ConfigError: there is no such retriever, or its package is missing.
    """
    if callable(name):
        return name
    if name == "backbone":
        return BackboneRetriever(backbone, batch_tokens)
    if name == "bm25":
        return Bm25Retriever()
    if name == "embedding":
        return EmbeddingRetriever(encoder or MINILM)
    raise ConfigError(f"retriever {name!r}: not one of {', '.join(KNOWN)}, nor a function{nearest(str(name), KNOWN)}")


def similarities(retriever: Retriever, queries: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
    """Call a retriever and check what it returns.

    Raises:
        PromptError: the result has another shape than (queries, texts), or a number in it is not finite.
    """
    found = np.asarray(retriever(queries, texts), dtype=np.float64)
    if found.shape != (len(queries), len(texts)):
        raise PromptError(
            f"the retriever returned an array of shape {found.shape} for {len(queries)} queries and "
            f"{len(texts)} texts; it must be ({len(queries)}, {len(texts)})"
        )
    if not np.isfinite(found).all():
        raise PromptError("the retriever returned NaN or infinity as a similarity; return finite numbers")
    return found
