"""Quantised backbones: linear layers in 8 or 4 bits by bitsandbytes or torchao, or as a checkpoint was quantised.

Input embeddings, output heads, norms and biases stay as they are, so tags fit a quantised model as they fit the model
that it was made from. References: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), NF4 in QLoRA (Dettmers et al.
2023, arXiv 2305.14314).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from icl_markup.errors import BackboneError
from icl_markup.sharded import whole

Quantisation = Literal[
    "auto", "none", "bitsandbytes-int8", "bitsandbytes-nf4", "bitsandbytes-fp4", "torchao-int8", "torchao-int4"
]
INSTALL = 'pip install "icl-markup[quantisation]"'
_GROUP = 32
"""Weights that share a scale in torchao-int4; input widths are multiples of it in nearly every model."""

_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bits."""

_PROBES = 8
_GRADIENT_TOLERANCE = 0.1


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--quantisation``."""
    parser.add_argument("--quantisation", choices=get_args(Quantisation), default="auto",
                        help="linear layers in 8 or 4 bits (auto: as tags, classifier or checkpoint say)")  # fmt: skip


def loading_options(
    wanted: Quantisation, settings: transformers.PretrainedConfig, device: torch.device, dtype: torch.dtype, name: str
) -> dict[str, Any]:
    """Return what `from_pretrained` is given for a quantised model; nothing where it is not quantised.

    Args:
        wanted: what the configuration asks for.
        settings: the checkpoint's own configuration, which may say that it is quantised already.
        device: where the model will be.
        dtype: the type of computation, and of everything that is not quantised.
        name: the backbone's name, for errors.

    Raises:
        BackboneError: the library is missing, there is no such path on the device, or the checkpoint is quantised
            otherwise.
    """
    own = getattr(settings, "quantization_config", None)
    if own:
        found = _name_of(own)
        if wanted not in ("auto", found):
            raise BackboneError(
                f"backbone {name!r} was saved quantised ({found}) and cannot be loaded with quantisation {wanted}; "
                f"set quantisation to auto, or name the checkpoint that it was made from"
            )
        _quieten()
        return {"device_map": {"": str(device)}}
    if wanted in ("auto", "none"):
        return {}
    library, _, form = wanted.partition("-")
    if find_spec(library) is None:
        raise BackboneError(f"quantisation {wanted} needs {library}: {INSTALL}")
    config = _bitsandbytes(form, dtype) if library == "bitsandbytes" else _torchao(form, device, dtype)
    _quieten()
    return {"quantization_config": config, "device_map": {"": str(device)}}


def _bitsandbytes(form: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    if form == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    # A layer without a type of its own takes that of the first input that it meets.
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _torchao(form: str, device: torch.device, dtype: torch.dtype) -> transformers.TorchAoConfig:
    from torchao import quantization

    # Compiler settings are a process' own affair; torchao would change them.
    if form == "int8":
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    if device.type == "cpu":
        try:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        except ImportError as error:
            raise BackboneError(
                f"this version of torchao has no 4-bit weights for CPUs ({error}); take bitsandbytes-nf4"
            ) from error
        return transformers.TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False))
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise BackboneError(
            f"torchao-int4 takes a CPU, or a CUDA device with dtype bf16, not {device.type} with "
            f"{str(dtype).removeprefix('torch.')}; take bitsandbytes-nf4, or set dtype to bf16"
        )
    packed = quantization.Int4WeightOnlyConfig(
        group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    return transformers.TorchAoConfig(packed)


def recorded(saved: Mapping[str, Any]) -> Quantisation:
    """Return how a backbone that a file names is quantised; auto where the checkpoint itself says, or it is not."""
    value: Any = saved.get("quantisation", "auto")
    return value if value in get_args(Quantisation) and value != "none" else "auto"


def quantisation_of(model: PreTrainedModel) -> str:
    """Return how a model is quantised: ``none``, a value of `Quantisation`, or the checkpoint's method (``gptq`` …)."""
    own = getattr(model.config, "quantization_config", None)
    return "none" if own is None or not getattr(model, "is_quantized", False) else _name_of(own)


def _name_of(own: Any) -> str:
    """Name a checkpoint's or model's ``quantization_config``."""
    details = dict(own if isinstance(own, Mapping) else own.to_dict())
    method = details.get("quant_method", "")
    if details.get("load_in_8bit"):
        return "bitsandbytes-int8"
    if details.get("load_in_4bit"):
        return f"bitsandbytes-{details.get('bnb_4bit_quant_type', 'fp4')}"
    method = str(getattr(method, "value", method)) or "unknown"
    if method != "torchao":
        return method
    kind = details.get("quant_type")
    kind = kind.get("default", kind) if isinstance(kind, Mapping) else kind
    kind = str(kind.get("_type") if isinstance(kind, Mapping) else kind)
    known = {"Int8WeightOnlyConfig": "int8", "Int4WeightOnlyConfig": "int4", "PrototypeInt4WeightOnlyConfig": "int4"}
    return f"torchao-{known.get(kind, kind)}"


def settle(model: PreTrainedModel, name: str) -> None:
    """Check that layers of a model that was just loaded are quantised, and keep it from changing them while it is used.

    Raises:
        BackboneError: the library found no layer that it can quantise.
    """
    form = quantisation_of(model)
    if form == "none":
        return
    layers = [module for _, module, _ in linear_layers(model)]
    if layers and all(is_plain(getattr(module, "weight", None)) for module in layers):
        kinds = ", ".join(sorted({type(module).__name__ for module in layers}))
        widths = ", ".join(map(str, sorted({width for _, _, width in linear_layers(model)})))
        raise BackboneError(
            f"backbone {name!r}: {form} quantises none of its layers ({kinds} of input widths {widths}); take another"
        )
    if form in ("bitsandbytes-nf4", "bitsandbytes-fp4") and next(model.parameters()).device.type == "cpu":
        # Seen in bitsandbytes 0.50 on CPUs with AVX-512: rows that share a block are scaled by each other's scales.
        odd = sorted({width for _, _, width in linear_layers(model) if width % _BLOCK})
        if odd:
            raise BackboneError(
                f"backbone {name!r}: on a CPU bitsandbytes computes wrong weights in 4 bits where a layer's input "
                f"width ({', '.join(map(str, odd))}) is no multiple of {_BLOCK}; take bitsandbytes-int8 or torchao-int8"
            )
    for module in model.modules():
        # On CPUs with these instructions, bitsandbytes stores 4-bit weights in another layout at the first forward
        # pass without gradients, and rounds their scales to bf16; a backward pass is not possible from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_plain(weight: object) -> TypeGuard[Tensor]:
    """Return whether a weight is an ordinary matrix of floating-point numbers, of which rows can be read."""
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter, FakeTensor):
        return False
    return weight.is_floating_point() and weight.ndim == 2


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that a model stores: parameters, buffers and, of quantised ones, codes and scales too."""
    seen = set()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        seen.add(name)
        yield from _parts(name, whole(value).detach())
    if quantisation_of(model) == "none":
        return
    for name, value in model.state_dict().items():  # bitsandbytes keeps scales in no parameter and no buffer
        if name not in seen and isinstance(value, Tensor):
            yield from _parts(name, value.detach())


def _parts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(value, part))


def weight_count(model: PreTrainedModel) -> int:
    """Return how many weights a model has; of a quantised layer those that it stands for, however they are packed.

    What is tied counts once.
    """
    counted = {id(parameter): parameter.numel() for parameter in model.parameters()}
    quantised = model.modules() if quantisation_of(model) != "none" else ()
    for module in quantised:
        rows, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if not own or not isinstance(rows, int) or not isinstance(width, int):
            continue
        if is_plain(getattr(module, "weight", None)):
            continue
        for name, value in own:
            if name != "bias":  # codes, scales and zeros
                counted.pop(id(value), None)
        counted[id(module)] = rows * width
    return sum(counted.values())


def stored_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of everything that a model stores; what is tied counts once."""
    found = {value.data_ptr(): value.numel() * value.element_size() for _, value in stored_tensors(model)}
    return sum(found.values())


def form_of(wanted: Quantisation, settings: transformers.PretrainedConfig) -> str:
    """Return how a model will be quantised that is loaded with these settings of a checkpoint; ``none``: not at all."""
    own = getattr(settings, "quantization_config", None)
    if own:
        return _name_of(own)
    return "none" if wanted == "auto" else wanted


def packed_bytes(model: PreTrainedModel, form: str) -> int:
    """Return the bytes that a model's weights and buffers take once its linear layers are quantised in some form.

    Args:
        model: the model as it is before, on fake tensors or real ones; what is tied counts once.
        form: as `form_of` returns it.

    Raises:
        BackboneError: it is not known how many bytes a weight takes in that form.
    """
    parts = {id(t.untyped_storage()): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    if form == "none":
        return sum(parts.values())
    if form not in _PACKED:
        raise BackboneError(f"cannot tell how many bytes weights take as {form}; known are {', '.join(_PACKED)}")
    for _, module, _ in linear_layers(model):
        weight: Any = module.weight
        rows = weight.shape[0]
        parts[id(weight.untyped_storage())] = int(_PACKED[form][0] * weight.numel() + _PACKED[form][1] * rows)
    return sum(parts.values())


# Bytes a weight and an output row: int8 of bitsandbytes has an fp32 scale a row; its 4 bits an 8-bit scale for 64
# weights and an fp32 one for 256 of those; int8 of torchao a scale a row, int4 a scale and a zero for each group.
_PACKED: dict[str, tuple[float, float]] = {
    "bitsandbytes-int8": (1.0, 4.0),
    "bitsandbytes-nf4": (0.5 + 1 / 64 + 4 / (64 * 256), 0.0),
    "bitsandbytes-fp4": (0.5 + 1 / 64 + 4 / (64 * 256), 0.0),
    "torchao-int8": (1.0, 4.0),
    "torchao-int4": (0.5 + 4 / _GROUP, 0.0),
}


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield linear layers with their names and input widths, quantised or not, in the same order; without the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        width = getattr(module, "nx" if isinstance(module, Conv1D) else "in_features", None)
        if module is not head and isinstance(width, int):
            yield name, module, width


def signs(rows: int, width: int, seed: int) -> Tensor:
    """Return random ±1, shape (rows, width), fp32: the same on every machine and in every version."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 2, (rows, width)).astype(np.float32) * 2 - 1)


@torch.no_grad()
def projection(module: nn.Module, width: int, dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """Return a·Wb of a linear layer's weights W, for random signs a and b, and the norm of Wb.

    It is read off what the layer computes, so that it does not matter how W is stored. Over random signs its square is
    on average the sum of the squares of W, and so is that of the norm.

    Args:
        module: the layer.
        width: the width of its inputs.
        dtype: the type that a quantised layer computes in.
        seed: seeds the signs.
    """
    weight = getattr(module, "weight", None)
    weight = whole(weight) if isinstance(weight, Tensor) else weight
    b = signs(1, width, seed)
    if is_plain(weight):
        oriented = weight.T if isinstance(module, Conv1D) else weight
        out = (oriented.float() @ b[0].to(weight.device)).cpu()
    else:
        device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
        there = b.to(device, dtype)
        plus, minus = module(torch.cat([there, -there])).float().cpu()
        out = (plus - minus) / 2  # without the bias
    return float(out @ signs(1, len(out), seed + 1)[0]), float(out.norm())


def check_gradients(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Check that gradients pass through every quantised layer to its inputs, and are those of the layer.

    A layer is linear in its inputs. So the difference of its outputs between two inputs, weighed by some numbers, is
    the gradient of that weighed sum times the difference of the inputs; that is compared for random signs. A layer that
    rounds its inputs may let no gradient pass, while the model's other paths do: the sum would be wrong, not zero.

    Args:
        model: the model.
        dtype: the type that layers compute in.

    Raises:
        BackboneError: a layer has no gradient, or another one; the message names it.
    """
    for index, (name, module, width) in enumerate(linear_layers(model)):
        weight = getattr(module, "weight", None)
        if is_plain(weight):
            continue
        device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
        at, step = signs(2 * _PROBES, width, index).to(device, dtype).split(_PROBES)
        try:
            with torch.enable_grad():
                leaf = at.clone().requires_grad_()
                out = module(leaf)
                weights = signs(_PROBES, out.shape[-1], index + 1).to(out)
                [gradient] = torch.autograd.grad((out * weights).sum(), leaf)
            with torch.no_grad():
                expected = ((module(at + step) - module(at)).float() * weights.float()).sum(-1)
        except RuntimeError as error:
            raise _no_gradient(model, name, str(error).splitlines()[0]) from error
        found = (gradient.float() * step.float()).sum(-1)
        if not torch.linalg.vector_norm(found - expected) <= _GRADIENT_TOLERANCE * torch.linalg.vector_norm(expected):
            raise _no_gradient(model, name, "its gradient is not that of what it computes")


def _no_gradient(model: PreTrainedModel, name: str, reason: str) -> BackboneError:
    return BackboneError(
        f"no gradient passes through {name} as {quantisation_of(model)} computes it ({reason}), so tags cannot be "
        "warmed up on this backbone; warm them up on the unquantised one, or quantised as bitsandbytes-nf4, "
        "bitsandbytes-int8 or torchao-int8, and use them on this one"
    )


class _OncePerLayer(logging.Filter):
    """Drops what LLM.int8() says on each call of each layer."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is kept."""
        return "inputs will be cast" not in record.getMessage()


def _quieten() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(one, _OncePerLayer) for one in logger.filters):
        logger.addFilter(_OncePerLayer())
