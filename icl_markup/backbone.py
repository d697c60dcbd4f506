"""The frozen language model: a batch of prompts in, logits of the candidates at each slot out.

One mechanism serves causal, sequence-to-sequence and masked models. While a batch runs, the model's output
head is replaced by one that only keeps its input; the logits of the few candidates are then computed from the
hidden states at the slots, so that no vocabulary-sized logits arise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_markup.batching import Batch
from icl_markup.embedded import resolve
from icl_markup.errors import BackboneError
from icl_markup.layout import Kind, Layout
from icl_markup.tags import TagTable, substituted
from icl_markup.text import TextEncoder

_AUTO_CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "masked": transformers.AutoModelForMaskedLM,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BackboneConfig:
    """Which language model, and how it runs."""

    name: str = "embedded"
    """A transformers folder or hub name, or ``embedded`` for the encoder inside this package."""

    revision: str | None = None
    """A hub model's revision (commit, tag or branch)."""

    kind: Literal["auto", "causal", "seq2seq", "masked"] = "auto"
    """The kind of model; auto reads it off the model's configuration."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The type of the weights; auto is bf16 on a GPU that has it, fp16 on other GPUs, fp32 on a CPU."""

    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast of the computation; auto is bf16 on a CPU with bf16 instructions, and none elsewhere."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes the best that is there."""

    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """The attention implementation; auto is eager for small encoders on a CPU, where it is faster."""

    max_length: int | None = None
    """The longest prompt in tokens; null: the model's own limit."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class Backbone:
    """A frozen model with its tokenizer.

    Attributes:
        model: the transformers model, in evaluation mode, no parameter of which requires a gradient.
        tokenizer: its tokenizer.
        kind: causal, seq2seq or masked.
        encoder: turns text into ids without special tokens.
        layout: what stands around a prompt.
        embedding: the module whose calls turn ids into vectors; in a sequence-to-sequence model the encoder's.
        max_length: the longest prompt in tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kind: Kind,
        *,
        name: str = "",
        revision: str | None = None,
        precision: Literal["no", "bf16", "fp16"] = "no",
        max_length: int | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.kind: Kind = kind
        self.name = name or str(getattr(model, "name_or_path", ""))
        self.revision = revision
        self.precision = precision
        self.encoder = TextEncoder(tokenizer)
        self.layout = Layout.of(tokenizer, kind)
        self.embedding: nn.Module = (
            model.get_encoder().get_input_embeddings() if kind == "seq2seq" else model.get_input_embeddings()
        )
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise BackboneError(f"{type(model).__name__} has no output head that can be read")
        self.max_length = max_length or _length_limit(model, tokenizer)
        self._check_head()

    @classmethod
    def load(cls, config: BackboneConfig | str = "embedded") -> Backbone:
        """Load any folder or hub name that transformers loads; weights are read from safetensors only.

        Raises:
            BackboneError: there is no such model, it has no language-model head, or an option does not fit.
        """
        if isinstance(config, str):
            config = BackboneConfig(config)
        path = resolve(config.name)
        hub: dict[str, Any] = {"revision": config.revision} if config.revision else {}
        device = _device(config.device)
        try:
            settings = transformers.AutoConfig.from_pretrained(path, **hub)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, use_fast=True, **hub)
        except (OSError, ValueError, KeyError) as error:
            raise BackboneError(
                f"backbone {config.name!r}: transformers cannot load it: {str(error).splitlines()[0]}"
            ) from error
        kind: Kind = _kind(settings) if config.kind == "auto" else config.kind
        attention = config.attention
        if attention == "auto":
            attention = "eager" if device.type == "cpu" and kind == "masked" else "sdpa"
        try:
            loaded = _AUTO_CLASSES[kind].from_pretrained(
                path,
                dtype=_dtype(config.dtype, device),
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **hub,
            )
        except (OSError, ValueError, ImportError) as error:
            raise BackboneError(f"backbone {config.name!r} as a {kind} model: {str(error).splitlines()[0]}") from error
        model, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise BackboneError(
                f"backbone {config.name!r} lacks weights of a {kind} language model ({missing[0]}, {len(missing)} in "
                "all): it was saved without its head; choose a checkpoint that has one"
            )
        if config.gradient_checkpointing:
            # The layers checkpoint only in training mode; what dropout there is, is switched off by itself.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        backbone = cls(
            model.to(device),
            tokenizer,
            kind,
            name=config.name,
            revision=config.revision or getattr(settings, "_commit_hash", None),
            precision=_precision(config.precision, device),
            max_length=config.max_length,
        )
        if config.gradient_checkpointing:
            _train_without_dropout(model)
        return backbone

    @property
    def device(self) -> torch.device:
        """The device of the input embedding, where batches are put."""
        return next(self.embedding.parameters()).device

    @property
    def width(self) -> int:
        """The width of an input embedding."""
        return int(next(self.embedding.parameters()).shape[1])

    @property
    def first_tag_id(self) -> int:
        """The first id that tags may take: the number of rows of the input embedding."""
        return int(next(self.embedding.parameters()).shape[0])

    @property
    def vocabulary(self) -> Tensor:
        """The ids of ordinary tokens (no special or added token), shape (n,)."""
        rows = min(self.first_tag_id, len(self.tokenizer))
        ids = [i for i in range(rows) if i not in self.encoder.reserved_ids]
        return torch.tensor(ids, device=self.device)

    @torch.no_grad()
    def checksum(self) -> str:
        """Return a checksum of every parameter and buffer, which any changed bit changes."""
        digest = hashlib.sha256()
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            raw = value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
            digest.update(name.encode())
            digest.update(raw)
        return digest.hexdigest()

    def candidate_logits(self, batch: Batch, table: TagTable | None = None) -> Tensor:
        """Return the logits of each slot's candidates.

        Args:
            batch: prompts with `batch.candidates` of shape (slots, most candidates).
            table: the tags' soft tokens, if the prompts hold any.

        Returns:
            fp32, shape (slots, most candidates); -inf where a slot has fewer candidates than others.
        """
        hidden = self._hidden(batch, table)
        logits = self._logits_of(hidden, batch.candidates.to(hidden.device))
        return logits.masked_fill(~batch.candidate_mask.to(hidden.device), float("-inf"))

    def token_log_probs(self, batch: Batch, table: TagTable | None = None) -> Tensor:
        """Return the log-probability, over the whole vocabulary, of `batch.targets` at each slot; fp32, (slots,)."""
        hidden = self._hidden(batch, table)
        targets = batch.targets.to(hidden.device)
        parts = []
        for rows, wanted in zip(hidden.split(256), targets.split(256), strict=True):
            logits = self._adjust(self._head(rows.to(self._head.weight.dtype)).float())
            parts.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        return torch.cat(parts)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the configured precision."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.precision])

    def _hidden(self, batch: Batch, table: TagTable | None) -> Tensor:
        """Run the model; return what its head is given at the slots, of shape (slots, hidden width)."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids.to(self.device),
            "attention_mask": batch.attention_mask.to(self.device),
        }
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = self._decoder_ids(batch)
        if self.kind != "masked":
            inputs["use_cache"] = False
        tags = substituted(self.embedding, table) if table is not None else nullcontext()
        with tags, self._head_bypassed() as kept, self.autocast():
            self.model(**inputs)
        return kept[0][batch.rows.to(self.device), batch.positions.to(self.device)]

    def _decoder_ids(self, batch: Batch) -> Tensor:
        start = self.model.config.decoder_start_token_id
        ids = torch.full((len(batch.input_ids), 1), start, device=self.device)
        return ids if batch.decoder_ids is None else torch.cat([ids, batch.decoder_ids.to(self.device)], dim=1)

    @contextmanager
    def _head_bypassed(self) -> Iterator[list[Tensor]]:
        kept: list[Tensor] = []
        original = self._head.forward

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden[..., :1]

        self._head.forward = keep  # type: ignore[method-assign]
        try:
            yield kept
        finally:
            self._head.forward = original  # type: ignore[method-assign]

    def _logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        weight = self._head.weight
        if weight.is_floating_point() and weight.ndim == 2:
            logits = torch.einsum("sh,sch->sc", hidden.float(), weight[tokens].float())
            bias = getattr(self._head, "bias", None)
            if bias is not None:
                logits = logits + bias[tokens].float()
        else:  # a quantised head cannot be read row by row
            logits = self._head(hidden).float().gather(1, tokens)
        return self._adjust(logits)

    def _adjust(self, logits: Tensor) -> Tensor:
        """Apply what some models do to logits after their head (Gemma 2, Cohere, Granite)."""
        config = self.model.config.get_text_config()
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compare our logits with the model's own on one short input; refuse a model where they differ."""
        ids = [*self.layout.prefix, *self.encoder.encode(" a b c"), *self.layout.suffix][: self.max_length]
        tokens = self.vocabulary[:26].cpu()
        batch = Batch.of_ids([ids], [(0, 0 if self.kind == "seq2seq" else len(ids) - 1)], tokens[None])
        inputs = {"input_ids": batch.input_ids.to(self.device)}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = self._decoder_ids(batch)
        with self.autocast():
            full = self.model(**inputs).logits[0, batch.positions[0]].float().cpu()[tokens]
        ours = self.candidate_logits(batch)[0].cpu()
        scale = full.abs().max().clamp(min=1.0)
        if not torch.allclose(ours / scale, full / scale, atol=0.05):
            raise BackboneError(
                f"{type(self.model).__name__}: logits computed for single candidates differ from the model's own by "
                f"{(ours - full).abs().max():.3g}; this architecture changes logits after its head in an unknown way"
            )


def _kind(settings: transformers.PretrainedConfig) -> Kind:
    if settings.is_encoder_decoder:
        return "seq2seq"
    for architecture in settings.architectures or ():
        if architecture.endswith("MaskedLM"):
            return "masked"
        if architecture.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")):
            return "causal"
    raise BackboneError(
        f"cannot tell the kind of a model with architectures {settings.architectures}; set kind to causal, seq2seq or "
        "masked"
    )


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise BackboneError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def _precision(name: str, device: torch.device) -> Literal["no", "bf16", "fp16"]:
    if name == "auto":
        fast = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bf16" if fast else "no"
    return name  # type: ignore[return-value]


def _length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    limits = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        # RoBERTa numbers positions from its padding index on, and so has that many fewer.
        table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
        padding = getattr(table, "padding_idx", None)
        limits.append(positions - (padding + 1 if padding is not None else 0))
    if tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length)
    return min(limits, default=2048)


def _train_without_dropout(model: PreTrainedModel) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
