"""Small tokenizers with the special tokens and the chat templates of real models, and tiny models that have them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icl_markup.backbone import Backbone
from tests.conftest import CORPUS

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's and Qwen's way of splitting text (the tokenizers' own configuration)."""

LLAMA3 = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
CHATML = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]
PHI3 = ["<s>", "<|endoftext|>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
GPT_OSS = ["<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"]

MODELS: dict[str, tuple[str, list[str]]] = {
    "llama3": ("byte level", LLAMA3),
    "llama3_2": ("byte level", LLAMA3),
    "qwen2_5": ("byte level", CHATML),
    "qwen3": ("byte level", CHATML),
    "chatml": ("byte level", CHATML),
    "gptoss": ("byte level", GPT_OSS),
    "deepseek_r1_distill": ("byte level", DEEPSEEK),
    "llama2": ("sentencepiece", ["<s>", "</s>"]),
    "mistral": ("sentencepiece", ["<s>", "</s>"]),
    "phi3": ("sentencepiece", PHI3),
    "gemma": ("sentencepiece without a prefix", GEMMA),
    "gemma3": ("sentencepiece without a prefix", GEMMA),
}
"""How a model's tokenizer splits text, and its special tokens: the first begins a text, the second ends one."""

ANSWERING = [name for name in MODELS if name != "deepseek_r1_distill"]
"""Those whose template lets them answer without reasoning first."""


@cache
def chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a model's kind, with its special tokens and its chat template; it adds the first itself."""
    kind, special = MODELS[name]
    base = _byte_level() if kind == "byte level" else _sentencepiece(kind == "sentencepiece")
    tokenizer = Tokenizer.from_str(base)
    # Phi-3's special tokens swallow the white space behind them (its tokenizer_config.json says rstrip).
    tokenizer.add_special_tokens([AddedToken(t, special=True, rstrip=name == "phi3" and t != "<s>") for t in special])
    first = special[0]
    adds_first = first if name not in ("qwen2_5", "qwen3", "chatml") else None
    if adds_first:
        ids = [(first, tokenizer.token_to_id(first))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=adds_first, eos_token=special[1], pad_token=special[1], unk_token="<unk>"
    )
    fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return fast


def chat_backbone(name: str, **options: Any) -> Backbone:
    """A Llama of random weights with that tokenizer."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(name)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return Backbone(transformers.LlamaForCausalLM(config), tokenizer, "causal", name=f"tiny-{name}", **options)


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    splits = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "\n\n\n\n"], trainer)
    return str(tokenizer.to_str())


@cache
def _sentencepiece(prefix: bool) -> str:
    """BPE over text whose spaces are marked, unknown characters in bytes; with a prefix, text begins with a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    own_bytes = [f"<0x{i:02X}>" for i in range(256)]
    characters = sorted({c for line in CORPUS for c in line} | set("[]/<>|_{}SYINT.,;:▁"))
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", *own_bytes], initial_alphabet=characters, show_progress=False
    )
    words = [word if prefix else f" {word}" for line in CORPUS for word in line.split()]
    tokenizer.train_from_iterator(words, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] == "<unk>"]
    return json.dumps(spec)
