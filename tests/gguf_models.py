"""Tiny GGUF files written in the tests, beside the transformers folders that they are made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, quants
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from icl_markup.gguf_tokenizers import RULES
from tests.conftest import byte_level_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}<s>assistant: "
SHAPES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@cache
def original_tokenizer(pre: str = "smollm") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts as a rule says, without BOS, as a ``tokenizer.json`` has it."""
    base = byte_level_tokenizer(mask=False)
    spec = json.loads(base.backend_tokenizer.to_str())
    spec["pre_tokenizer"] = RULES[pre].pre_tokenizer()
    spec["normalizer"] = {"type": "NFC"} if RULES[pre].normalizes else None
    spec["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", chat_template=TEMPLATE,
    )  # fmt: skip


def original_model(seed: int = 0) -> transformers.LlamaForCausalLM:
    """A Llama with random weights whose spread is that of trained ones."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(original_tokenizer()), num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=2, pad_token_id=1, tie_word_embeddings=True, initializer_range=0.1, **SHAPES,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight after it was stored as a GGUF type and read again."""
    if kind == "F32" or weight.ndim == 1:
        return weight.clone()
    as_type = GGMLQuantizationType[kind]
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), as_type), as_type).copy())


@dataclass
class Written:
    """What a file is written from; tests change a part of it."""

    model: transformers.LlamaForCausalLM
    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    kind: str = "Q4_1"
    embedding: str = "Q8_0"
    architecture: str = "llama"


def contents(model: transformers.LlamaForCausalLM, pre: str = "smollm") -> Written:
    """Return what llama.cpp writes of a model and the tokenizer that cuts as `pre` says."""
    config, tokenizer = model.config, original_tokenizer(pre)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    fields = {
        "general.name": "tiny",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    state = model.state_dict()
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _BLOCKS.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads:  # llama.cpp pairs the halves of rotary positions otherwise
                rows, width = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
            tensors[f"blk.{layer}.{theirs}"] = weight
    return Written(model, fields, tensors)


def write_gguf(path: Path, content: Written) -> Path:
    """Write a file."""
    writer = gguf.GGUFWriter(path, content.architecture)
    for key, value in content.fields.items():
        add: Callable[..., None] = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array,
        }[type(value)]  # fmt: skip
        add(key, value)
    for name, weight in content.tensors.items():
        array = np.ascontiguousarray(weight.float().numpy())
        kind = content.embedding if name == "token_embd" else content.kind
        if kind == "F32" or array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            as_type = GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", quants.quantize(array, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_original(folder: Path, model: transformers.LlamaForCausalLM, pre: str = "smollm") -> Path:
    """Write the transformers folder that a file is made from."""
    model.save_pretrained(folder)
    original_tokenizer(pre).save_pretrained(folder)
    return folder
