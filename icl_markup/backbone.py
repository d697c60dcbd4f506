"""The frozen language model: a batch of prompts in, logits of the candidates at each slot out.

One mechanism serves causal, sequence-to-sequence and masked models. While a batch runs, the model's output
head is replaced by one that only keeps its input; the logits of the few candidates are then computed from the
hidden states at the slots, so that no vocabulary-sized logits arise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from threading import RLock
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from icl_markup.activations import lean_activations, recomputes
from icl_markup.backbone_checks import check_head, check_sees_nothing_ahead
from icl_markup.batching import Batch
from icl_markup.beginnings import beginning_length, computed, without_beginning
from icl_markup.devices import to_device
from icl_markup.errors import BackboneError
from icl_markup.exactness import Exactness, check_decoder, check_exactness
from icl_markup.layout import Kind, Layout
from icl_markup.loading import DTYPES, BackboneConfig, checkpoint_gradients, length_limit, load_pretrained
from icl_markup.models import DEFAULT
from icl_markup.normalizer import log_normalizer
from icl_markup.packing import attention_mask
from icl_markup.quantisation import is_plain, quantisation_of, stored_tensors, weight_count
from icl_markup.sharded import is_sharded
from icl_markup.tags import TagTable, substituted
from icl_markup.text import TextEncoder

__all__ = ["Backbone", "BackboneConfig"]


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
        lock: held while the model runs: for that time its head and its embedding are not its own.
        quantisation: how its linear layers are quantised; ``none`` where they are not.

    Raises:
        BackboneError: the model has no output head, or logits at its slots are not those of the model itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kind: Kind,
        *,
        name: str = "",
        revision: str | None = None,
        precision: Literal["none", "bf16", "fp16"] = "none",
        max_length: int | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.lock = RLock()
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
        self.quantisation = quantisation_of(model)
        if not is_plain(next(self.embedding.parameters(), None)):
            raise BackboneError(
                f"the input embedding of {self.name!r} is quantised ({self.quantisation}); soft tokens stand in for "
                "rows of an ordinary one: choose a checkpoint that keeps it"
            )
        self.max_length = max_length or length_limit(model, tokenizer)
        self._check()

    def _check(self) -> None:
        check_head(self)

    @classmethod
    def load(cls, config: BackboneConfig | str = DEFAULT) -> Backbone:
        """Load any folder or hub name that transformers loads; weights are read from safetensors only.

        Raises:
            BackboneError: there is no such model, it has no language-model head, or an option does not fit.
        """
        loaded = load_pretrained(BackboneConfig(config) if isinstance(config, str) else config)
        backbone = cls(
            loaded.model,
            loaded.tokenizer,
            loaded.kind,
            name=loaded.config.name,
            revision=loaded.revision,
            precision=loaded.precision,
            max_length=loaded.config.max_length,
        )
        if loaded.config.gradient_checkpointing:
            checkpoint_gradients(loaded.model)
        return backbone

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=RLock())

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
    def parameters(self) -> int:
        """How many weights it has, quantised or not."""
        return weight_count(self.model)

    @property
    def vocabulary(self) -> Tensor:
        """The ids of ordinary tokens (no special or added token), shape (n,)."""
        rows = min(self.first_tag_id, len(self.tokenizer))
        ids = [i for i in range(rows) if i not in self.encoder.reserved_ids]
        return torch.tensor(ids, device=self.device)

    @property
    def is_exact(self) -> bool:
        """Whether it computes in fp32 throughout, so that the same answer by another way differs by little rounding."""
        first = next(self.model.parameters()).dtype
        return self.precision == "none" and self.quantisation == "none" and first == torch.float32

    @property
    def is_sharded(self) -> bool:
        """Whether its layers are split over processes, which must then compute, hash and save together."""
        return is_sharded(self.model)

    @property
    def runs_on_cpu(self) -> bool:
        """Whether its forward and backward passes are those of a CPU."""
        return self.device.type == "cpu"

    @property
    def shares_names(self) -> bool:
        """Whether the names that are scored at a slot may share the work for their prompt; checked at first use."""
        if self.kind == "causal":
            return self.exactness.limit > 0
        return self.kind == "seq2seq" and not self._recomputes and not self._decoder_obstacle

    @cached_property
    def _decoder_obstacle(self) -> str:
        return check_decoder(self)

    @cached_property
    def exactness(self) -> Exactness:
        """Whether prompts may be packed over a cache of what they share; checked at first use."""
        return check_exactness(self)

    @torch.no_grad()
    def checksum(self) -> str:
        """Return a checksum of every parameter and buffer, which any changed bit changes, split or not."""
        digest = hashlib.sha256()
        for name, value in stored_tensors(self.model):
            raw: Any = value.contiguous().flatten().view(torch.uint8).cpu().numpy()
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
        return self.logits_at(self._hidden(batch, table), batch.candidates, batch.candidate_mask)

    def slot_states(self, batch: Batch, table: TagTable | None = None) -> Tensor:
        """Return what the head is given at each slot of a batch, (slots, hidden width)."""
        return self._hidden(batch, table)

    def logits_at(self, hidden: Tensor, candidates: Tensor, mask: Tensor) -> Tensor:
        """Return logits of candidates, given what the head is given at their slots; shapes as in `candidate_logits`."""
        logits = self._logits_of(hidden, to_device(candidates, hidden.device))
        return logits.masked_fill(~to_device(mask, hidden.device), float("-inf"))

    def log_probs_at(self, hidden: Tensor, targets: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return log-probabilities of tokens over the whole vocabulary.

        Args:
            hidden: what the head is given at some places, (places, hidden width).
            targets: token ids, (tokens,).
            rows: the place that predicts each of them, (tokens,); None: there is one place for each.

        Returns:
            fp32, (tokens,).
        """
        targets = to_device(targets, hidden.device)
        if any(p.requires_grad for p in self._head.parameters()):
            log_probs = self._all_logits(hidden).log_softmax(-1)
            index = torch.arange(len(targets), device=hidden.device) if rows is None else to_device(rows, hidden.device)
            return log_probs[index, targets]
        vocabulary = int(self._head.weight.shape[0]) if is_plain(self._head.weight) else self.first_tag_id
        normalizer = log_normalizer(hidden, self._head_function(), vocabulary)
        if rows is not None:
            index = to_device(rows, hidden.device)
            # Embeddings, as the gradient of indexing adds up in an order that varies between runs on several threads.
            hidden, normalizer = F.embedding(index, hidden), F.embedding(index, normalizer[:, None])[:, 0]
        return self._logits_of(hidden, targets[:, None])[:, 0] - normalizer

    def _head_function(self) -> Callable[[Tensor], Tensor]:
        """Return a function from states to fp32 logits of the vocabulary: in half precision if tags train in it."""
        weight = self._head.weight
        if self.precision == "none" or not torch.is_grad_enabled() or not is_plain(weight):
            return self._all_logits
        dtype = DTYPES[self.precision]
        cast, bias = weight.to(dtype), getattr(self._head, "bias", None)
        bias = None if bias is None else bias.to(dtype)
        return lambda rows: self._adjust(F.linear(rows.to(dtype), cast, bias).float())

    def _all_logits(self, rows: Tensor) -> Tensor:
        weight = self._head.weight
        return self._adjust(self._head(rows.to(weight.dtype) if is_plain(weight) else rows).float())

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states of ordinary texts: the encoder's where there is one, or the model's.

        Args:
            input_ids: padded on the right, (texts, longest), int64.
            attention_mask: the same shape, 1 where a token is.

        Returns:
            Shape (texts, longest, hidden width).
        """
        body = self.model.get_encoder() if self.kind == "seq2seq" else self.model.base_model
        inputs = {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}
        with self.lock, self.autocast():
            states: Tensor = body(**inputs).last_hidden_state
        return states

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the configured precision."""
        if self.precision == "none":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def _hidden(self, batch: Batch, table: TagTable | None) -> Tensor:
        """Run the model; return what its head is given at the slots, of shape (slots, hidden width)."""
        cache: DynamicCache | None = None
        may_keep = table is not None and torch.is_grad_enabled() and batch.visible is None
        if may_keep and table is not None and self._keeps_beginnings(batch.input_ids.shape[1]):
            length = beginning_length(batch, table.first_id)
            if length:
                cache = computed(self, batch.input_ids[0, :length], len(batch.input_ids))
                batch = without_beginning(batch, length)
            elif self._asking_costs():
                cache = DynamicCache()  # says that no position restarts, where transformers would look
        more = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        hidden = self.hidden_states({**self.inputs_of(batch), **more}, table)
        return hidden[to_device(batch.rows, self.device), to_device(batch.positions, self.device)]

    def _asking_costs(self) -> bool:
        """Whether the CPU, where it asks for a value, waits for all that was given to the device before."""
        return self.device.type != "cpu"

    def _keeps_beginnings(self, longest: int) -> bool:
        """Whether prompts may go on from keys and values that were computed without a gradient."""
        if self.kind != "causal" or self._recomputes or self.is_sharded:
            return False  # processes that share the layers must all run them equally often
        return longest <= self.exactness.limit and not any(p.requires_grad for p in self.model.parameters())

    def inputs_of(self, batch: Batch) -> dict[str, Any]:
        """Return the model's keyword arguments for a batch, as it is read for its slots."""
        inputs: dict[str, Any] = {"input_ids": to_device(batch.input_ids, self.device)}
        if batch.visible is not None:
            assert batch.position_ids is not None
            inputs["position_ids"] = to_device(batch.position_ids, self.device)
            inputs["attention_mask"] = attention_mask(self, to_device(batch.visible, self.device))
        elif not self._needs_no_mask(batch):
            inputs["attention_mask"] = to_device(batch.attention_mask, self.device)
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = self.decoder_ids(batch)
        if self.kind != "masked":
            inputs["use_cache"] = False
        return inputs

    def _needs_no_mask(self, batch: Batch) -> bool:
        """Whether padding, which is on the right, is seen by no token that is read: attention without a mask is faster.

        Models that see all tokens need none where nothing is padded. The mask is on the CPU, and no device is asked.
        """
        if self.kind == "causal":
            return self.sees_nothing_ahead
        return bool(batch.attention_mask.all())

    @cached_property
    def sees_nothing_ahead(self) -> bool:
        """Whether a token's states are the same, to the bit, whatever follows it; checked at first use."""
        return check_sees_nothing_ahead(self)

    def hidden_states(self, inputs: Mapping[str, Any], table: TagTable | None = None) -> Tensor:
        """Run the model on its own keyword arguments; return what its head is given, (rows, length, hidden width)."""
        return self.run(inputs, table)[0]

    def run(self, inputs: Mapping[str, Any], table: TagTable | None = None) -> tuple[Tensor, Any]:
        """Do what `hidden_states` does, and return the model's other outputs, too."""
        tags = substituted(self.embedding, table) if table is not None else nullcontext()
        is_trained = torch.is_grad_enabled() and not self._recomputes
        lean = lean_activations(self.model) if is_trained else nullcontext()
        with self.lock, tags, lean, self._head_bypassed() as kept, self.autocast():
            outputs = self.model(**inputs)
        return kept[0], outputs

    @property
    def _recomputes(self) -> bool:
        """Whether layers recompute their activations in the backward pass."""
        return any(map(recomputes, self.model.modules()))

    def decoder_ids(self, batch: Batch) -> Tensor:
        """Return the ids that a sequence-to-sequence decoder is given, (prompts, decoder length)."""
        start = self.model.config.decoder_start_token_id
        ids = torch.full((len(batch.input_ids), 1), start, device=self.device)
        return ids if batch.decoder_ids is None else torch.cat([ids, to_device(batch.decoder_ids, self.device)], dim=1)

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
        if is_plain(weight):
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
