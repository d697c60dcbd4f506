"""Loads a pretrained model with its tokenizer: kind, device, dtype and length are read off what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_markup.cache import cache_folder
from icl_markup.errors import BackboneError
from icl_markup.hub import HUB_ERRORS
from icl_markup.layout import Kind
from icl_markup.models import DEFAULT, MODELS, remedy, resolve
from icl_markup.quantisation import Quantisation, loading_options, recorded, settle
from icl_markup.sharded import shard_layers, shards_layers

AUTO_CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "masked": transformers.AutoModelForMaskedLM,
}
"""The class that loads each kind of model."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of weights and of autocast, by their names in configurations."""


@dataclass(frozen=True)
class BackboneConfig:
    """Which language model, and how it runs."""

    name: str = DEFAULT
    """A model that ``icl-markup models`` lists, a transformers folder, a GGUF file (a path, or user/repo/file.gguf on
    the hub), or a hub name."""

    revision: str | None = None
    """A hub model's revision (commit, tag or branch)."""

    kind: Literal["auto", "causal", "seq2seq", "masked"] = "auto"
    """The kind of model; auto reads it off the model's configuration."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The type of the weights; auto is bf16 on a GPU that has it, fp16 on other GPUs, fp32 on a CPU."""

    quantisation: Quantisation = "auto"
    """Linear layers in 8 or 4 bits (the extra ``quantisation``); auto is what the checkpoint itself says, and
    where it says nothing, none. Embeddings, head, norms and biases stay in dtype."""

    precision: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Autocast of the computation; auto is bf16 on a CPU with AMX (where it is faster than fp32), fp16 (with loss
    scaling) where the weights are fp16 on an accelerator, and none elsewhere and where quantised."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto takes the best that is there."""

    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """The attention implementation; auto is that of transformers (sdpa where a model has it)."""

    max_length: int | None = None
    """The longest prompt in tokens; null: the model's own limit."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class Loaded:
    """A model on its device, with everything that was read off it."""

    config: BackboneConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    revision: str | None
    precision: Literal["none", "bf16", "fp16"]


@dataclass(frozen=True)
class Source:
    """What is known of a model before its weights are read; `path` is what transformers loads."""

    settings: transformers.PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    is_quantised: bool
    path: str


@dataclass(frozen=True)
class Settled:
    """The type of weights, the autocast and the attention implementation (None: transformers' choice) of a run."""

    dtype: torch.dtype
    precision: Literal["none", "bf16", "fp16"]
    attention: str | None


def load_pretrained(config: BackboneConfig) -> Loaded:
    """Load a folder or hub name that transformers loads; weights are read from safetensors only, no code of it is run.

    Raises:
        BackboneError: there is no such model, its weights are damaged, it has no language-model head, or an option, or
            what the launcher says of models split over processes (`icl_markup.sharded`), does not fit.
    """
    sharded = shards_layers()
    source = read_source(config)
    kind, is_quantised = source.kind, source.is_quantised
    if sharded and is_quantised:
        raise BackboneError(f"backbone {config.name!r} is quantised and cannot be split over processes; launch without")
    device = device_of(config.device)
    plan = settled(config, source, device)
    quantised = loading_options(config.quantisation, source.settings, device, plan.dtype, config.name)
    if sharded and plan.precision == "fp16":  # accelerate would unscale gradients twice where it knows of FSDP
        raise BackboneError("precision fp16 does not go with a backbone split over processes; take bf16 or none")
    wanted = {} if plan.attention is None else {"attn_implementation": plan.attention}
    try:
        model, report = AUTO_CLASSES[kind].from_pretrained(
            source.path,
            dtype=plan.dtype,
            **wanted,
            **quantised,
            use_safetensors=True,
            output_loading_info=True,
            **_hub(config),
        )
    except (OSError, ValueError, ImportError) as error:
        raise BackboneError(f"backbone {config.name!r} as a {kind} model: {_first_line(error)}") from error
    except SafetensorError as error:
        raise BackboneError(_damaged(config, source.path, error)) from error
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        if not is_quantised:
            raise
        raise BackboneError(
            f"backbone {config.name!r} cannot be quantised ({config.quantisation}) on {device}: {_first_line(error)}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BackboneError(
            f"backbone {config.name!r} lacks weights of a {kind} language model ({missing[0]}, {len(missing)} in all): "
            "it was saved without its head; choose a checkpoint that has one"
        )
    # Short names have one version, and are given no revision when they are loaded again.
    commit = None if config.name in MODELS else getattr(source.settings, "_commit_hash", None)
    revision = config.revision or commit
    settle(model, config.name)
    if sharded:
        shard_layers(model, device)
    placed = model if quantised or sharded else model.to(device)
    return Loaded(config, placed, source.tokenizer, kind, revision, plan.precision)


def read_source(config: BackboneConfig) -> Source:
    """Read a model's configuration and tokenizer, and no weights.

    Raises:
        BackboneError: one of them is not there or cannot be used, or the kind of model cannot be told.
    """
    path = resolve(config.name, config.revision)
    try:
        settings = transformers.AutoConfig.from_pretrained(path, **_hub(config))
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, use_fast=True, **_hub(config))
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"backbone {config.name!r}: transformers cannot load it: {_first_line(error)}{remedy(config.name)}"
        ) from error
    kind: Kind = _kind(settings) if config.kind == "auto" else config.kind
    is_quantised = config.quantisation not in ("auto", "none") or bool(getattr(settings, "quantization_config", None))
    return Source(settings, tokenizer, kind, is_quantised, path)


def settled(config: BackboneConfig, source: Source, device: torch.device, *, has_bf16: bool | None = None) -> Settled:
    """Return what a configuration's ``auto`` stands for on a device.

    Args:
        config: the configuration.
        source: what was read of the model.
        device: where it will be.
        has_bf16: whether a GPU that is not here computes in bf16; None: ask the one that is.

    Raises:
        BackboneError: the precision does not go with the device or the quantisation.
    """
    dtype = _dtype(config.dtype, device, source.is_quantised, has_bf16)
    precision = _precision(config.precision, device, dtype, source.is_quantised)
    attention = None if config.attention == "auto" else config.attention
    return Settled(dtype, precision, attention)


def _hub(config: BackboneConfig) -> dict[str, Any]:
    # Said outright: left open, transformers asks at the terminal whether to run the code that a model brings along.
    return {"trust_remote_code": False} | ({"revision": config.revision} if config.revision else {})


def config_of(saved: Mapping[str, Any], *, device: str = "auto", quantisation: Quantisation = "auto") -> BackboneConfig:
    """Return the configuration of a backbone that a tag or classifier file names, quantised as it was unless told."""
    wanted = recorded(saved) if quantisation == "auto" else quantisation
    return BackboneConfig(str(saved["name"]), revision_of(saved), device=device, quantisation=wanted)


def revision_of(saved: Mapping[str, Any]) -> str | None:
    """Return the revision of a backbone that a file names; earlier versions wrote one beside short names too."""
    return None if saved["name"] in MODELS else saved["revision"]


def _damaged(config: BackboneConfig, path: str, error: Exception) -> str:
    """Return what to say of weights that are no whole safetensors file; the file is named if it can be found."""
    folder = Path(path)
    if folder.is_relative_to(cache_folder()):
        todo = f"delete {folder}, which is made again when it is needed"
    elif folder.is_dir():
        todo = "copy or download the model again"
    else:
        try:
            folder = Path(snapshot_download(path, revision=config.revision, local_files_only=True))
        except HUB_ERRORS:
            return (
                f"{path}: damaged, or not whole: its weights cannot be read ({_first_line(error)}); download it again"
            )
        todo = f"delete {folder.parents[1]}, and the model is downloaded again"
    shown = next((file for file in sorted(folder.glob("*.safetensors")) if not _opens(file)), folder)
    return f"{shown}: damaged, or not whole: it cannot be read as weights ({_first_line(error)}); {todo}"


def _opens(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def device_of(name: str) -> torch.device:
    """Return the device that a configuration names; auto takes the best that is there."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise BackboneError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _dtype(name: str, device: torch.device, is_quantised: bool, has_bf16: bool | None) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        half = torch.float32 if is_quantised else torch.float16  # fp16 trains with loss scaling, under autocast
        return torch.bfloat16 if (torch.cuda.is_bf16_supported() if has_bf16 is None else has_bf16) else half
    return torch.float32


def _precision(
    name: str, device: torch.device, dtype: torch.dtype, is_quantised: bool
) -> Literal["none", "bf16", "fp16"]:
    if is_quantised:
        # Under autocast inputs come in two types, and layers of bitsandbytes cast their biases to each, for good.
        if name in ("auto", "none"):
            return "none"
        raise BackboneError(f"precision {name} does not go with a quantised backbone; set dtype instead")
    if name == "fp16" and device.type == "cpu":
        raise BackboneError("precision fp16 needs an accelerator; on a CPU take bf16 or none")
    if name != "auto":
        return name  # type: ignore[return-value]
    if device.type == "cpu":
        # Without tiles, a product in bf16 took twice as long as in fp32 on a Xeon that has avx512_bf16.
        knows_tiles = hasattr(torch.cpu, "_is_amx_tile_supported")  # torch 2.6 on
        return "bf16" if knows_tiles and torch.cpu._is_amx_tile_supported() else "none"
    return "fp16" if dtype == torch.float16 else "none"


def length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest input in tokens that a model takes; 2048 where neither it nor its tokenizer says."""
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


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass: layers do so in training mode only, so dropout is switched off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
