"""What each kind of backbone puts around a prompt, and how it marks a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from icl_markup.errors import BackboneError

Kind = Literal["causal", "seq2seq", "masked"]


@dataclass(frozen=True)
class Layout:
    """Special tokens around a prompt.

    Attributes:
        kind: the kind of backbone.
        prefix: ids before the prompt (BOS, CLS, the head of a chat template).
        suffix: ids after it (SEP, the encoder's EOS, a chat template's generation prompt).
        mask_id: the mask token that marks a slot; -1 where a slot is marked by nothing.
        space: whether a space stands between `prefix` and a prompt that begins with text.
        trims: whether white space at both ends of a prompt is dropped, as a chat template may do.
        answer_spaced: whether a space stands between `suffix` and the answer; None: as the template has it, with
            nothing between a prompt and its answer.
    """

    kind: Kind
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    mask_id: int = -1
    space: bool = False
    trims: bool = False
    answer_spaced: bool | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> Layout:
        """Read a tokenizer's own special tokens off what it puts around a text.

        Raises:
            BackboneError: a masked backbone's tokenizer has no mask token.
        """
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a", add_special_tokens=True)["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        prefix, suffix = tuple(full[:start]), tuple(full[start + len(bare) :])
        if kind == "causal":
            return cls(kind, prefix)  # an EOS after the prompt would end it before the answer
        if kind == "seq2seq":
            return cls(kind, prefix, suffix)
        if tokenizer.mask_token_id is None:
            raise BackboneError(f"the tokenizer of {tokenizer.name_or_path!r} has no mask token; is it a masked model?")
        return cls(kind, prefix, suffix, tokenizer.mask_token_id)

    @property
    def many_queries(self) -> bool:
        """Whether one prompt may hold several queries: each needs a slot that nothing after it depends on."""
        return self.kind == "masked"

    @property
    def stops_at_slot(self) -> bool:
        """Whether a prompt ends where the answer would be generated."""
        return self.kind != "masked"
