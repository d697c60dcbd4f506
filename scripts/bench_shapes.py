"""Models of well-known shapes with random weights, and a tokenizer for each: time and memory depend on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icl_markup import Backbone, Task
from icl_markup.embedded import sample_folders
from icl_markup.readers import TaskSource, read_task

MAX_LENGTH = 8192


def sample_tasks() -> list[Task]:
    """Return the sample tasks inside the package."""
    return [read_task(TaskSource(str(folder))) for folder in sample_folders("warmup")]


def _texts() -> Iterator[str]:
    for task in sample_tasks():
        for examples in task.splits.values():
            yield from (f"{e.label} {e.text}" for e in examples)
    # A letter is one token, with and without the space before it: option symbols need that.
    yield from (f" {c} {c}: {c}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for _ in range(200))


def _byte_level(special: dict[str, str], single: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 8,000 tokens on the sample tasks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = list(special.values())
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, i) for i, name in enumerate(names)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special)


def _llama(**sizes: int) -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.LlamaConfig(
        max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **sizes,
    )  # fmt: skip
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.LlamaForCausalLM(config), _byte_level(special, "<s> $A")


def tiny_llama(max_length: int) -> Backbone:
    """Return a causal backbone of two layers, which takes prompts of so many tokens."""
    torch.manual_seed(0)
    model, tokenizer = _llama(
        vocab_size=8000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model.config.max_position_embeddings = tokenizer.model_max_length = max_length
    return Backbone(model, tokenizer, "causal", name="llama-tiny-shape")


def _llama_135m() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    return _llama(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip


def _llama_1b_cut() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    return _llama(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip


def _t5_small() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = _byte_level(special, "$A </s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>"]})
    return transformers.T5ForConditionalGeneration(config), tokenizer


def _roberta_base() -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1
    )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
               "mask_token": "<mask>"}  # fmt: skip
    return transformers.RobertaForMaskedLM(config), _byte_level(special, "<s> $A </s>")


_BUILDERS: dict[str, tuple[str, Callable[[], tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]]]] = {
    "llama-135m": ("causal", _llama_135m),
    "llama-1b-2-layers": ("causal", _llama_1b_cut),
    "flan-t5-small": ("seq2seq", _t5_small),
    "roberta-base": ("masked", _roberta_base),
}

SHAPES = tuple(_BUILDERS)
"""Shapes by name: SmolLM2-135M, Llama-3.2-1B with 2 of its 16 layers, Flan-T5-small and RoBERTa-base."""


def backbone_of(shape: str, precision: str) -> Backbone:
    """Build a backbone of a shape, the same in every process.

    Args:
        shape: one of `SHAPES`.
        precision: ``fp32`` or ``bf16`` (autocast over fp32 weights).
    """
    autocast: Literal["bf16", "none"] = "bf16" if precision == "bf16" else "none"
    torch.manual_seed(0)
    kind, build = _BUILDERS[shape]
    model, tokenizer = build()
    return Backbone(model, tokenizer, kind, name=shape, precision=autocast)  # type: ignore[arg-type]
