"""Root-mean-square norms while tags are trained: the same outputs, the same gradients to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from icl_markup import Backbone
from icl_markup.episodes import Query
from icl_markup.model import MarkupModel
from icl_markup.norms import fast_norms
from icl_markup.skeleton import Skeleton
from tests.conftest import tiny_backbone
from tests.test_warmup import warm_up


class Twice(LlamaRMSNorm):  # type: ignore[misc]
    """A norm by its looks, which computes something else."""

    def forward(self, states: Tensor) -> Tensor:
        return 2 * super().forward(states)


class Asking(LlamaRMSNorm):  # type: ignore[misc]
    """A norm that is given more than states."""

    def forward(self, states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(states) * gate


class Gated(LlamaRMSNorm):  # type: ignore[misc]
    """A norm that may be given more than states, as those of Mamba's kind are."""

    def forward(self, states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed: Tensor = super().forward(states)
        return normed if gate is None else normed * gate


class OfOneWidth(LlamaRMSNorm):  # type: ignore[misc]
    """A norm that checks what it is given in a way of its own."""

    def forward(self, states: Tensor) -> Tensor:
        assert states.shape[-1] == 96
        return super().forward(states)


class Failing(LlamaRMSNorm):  # type: ignore[misc]
    """A norm that cannot be tried out."""

    def forward(self, states: Tensor) -> Tensor:
        raise AssertionError(f"not {tuple(states.shape)}")


class Own:
    """As much of a backbone as is looked at."""

    def __init__(self, model: nn.Module, device: str = "cpu"):
        self.model, self.runs_on_cpu, self.is_sharded = model, device == "cpu", False


def norm_of(kind: type[nn.Module], **how: Any) -> nn.Module:
    torch.manual_seed(0)
    module = kind(96, **how)
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    return module.requires_grad_(False)


def fast(module: nn.Module, device: str = "cpu") -> Any:
    return fast_norms(Own(module, device))  # type: ignore[arg-type]


KINDS = [LlamaRMSNorm, Qwen3RMSNorm, T5LayerNorm, GemmaRMSNorm, Gemma3RMSNorm, Gated, OfOneWidth]


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 1500, 96), (2, 4, 7, 96)])
def test_outputs_are_equal_to_the_bit_and_gradients_to_rounding(
    kind: type[nn.Module], shape: tuple[int, ...], eps: float
) -> None:
    module = norm_of(kind, eps=eps)
    states, gradient = torch.randn(shape, dtype=torch.float32) * 3, torch.randn(shape)
    states.flatten()[:2] = 0.0
    results = []
    for quick in (False, True):
        given = states.clone().requires_grad_()
        with fast(module) if quick else nullcontext(1) as count:
            output = module(given)
        assert count == 1
        output.backward(gradient)
        results.append((output.detach(), given.grad))
    (output, slope), (fast_output, fast_slope) = results
    assert torch.equal(output, fast_output)
    assert slope is not None and fast_slope is not None
    torch.testing.assert_close(fast_slope, slope, rtol=2e-5, atol=2e-6)
    # Against numbers of twice the digits, it is no further off than what it stands for.
    double = norm_of(kind, eps=eps).double()
    exact = states.double().requires_grad_()
    x, scale = exact, double.weight + (1 if "Gemma" in kind.__name__ else 0)  # type: ignore[operator]
    (scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).backward(gradient.double())
    assert exact.grad is not None
    off = [(one.double() - exact.grad).abs().max() for one in (slope, fast_slope)]
    assert off[1] <= 1.5 * off[0] + 1e-7


def test_other_modules_and_other_numbers_are_left_alone() -> None:
    trained = norm_of(LlamaRMSNorm).requires_grad_(True)
    others = nn.ModuleList([
        norm_of(Twice), norm_of(Asking), norm_of(Failing), trained, norm_of(LlamaRMSNorm).to(torch.bfloat16),
        norm_of(nn.LayerNorm), norm_of(nn.Linear, out_features=3),
    ])  # fmt: skip
    with fast(others) as count:
        assert count == 0
    with fast(norm_of(LlamaRMSNorm), "cuda") as count:
        assert count == 0
    module = norm_of(LlamaRMSNorm)
    halves = torch.randn(4, 96).bfloat16().requires_grad_()
    expected = module(halves)
    with fast(module), pytest.raises(ZeroDivisionError):
        assert torch.equal(module(halves), expected)
        with torch.no_grad():
            assert module(halves.float()).grad_fn is None
        raise ZeroDivisionError
    assert "forward" not in vars(module)


def test_what_is_given_besides_states_is_passed_on() -> None:
    module, states, gate = norm_of(Gated), torch.randn(4, 96).requires_grad_(), torch.randn(4, 96)
    expected = module(states, gate)
    with fast(module) as count:
        assert count == 1
        for output in (module(states, gate), module(states, gate=gate), module(states=states, gate=gate)):
            assert torch.equal(output, expected)
        assert torch.equal(module(states, None), module(states=states))


def test_states_of_any_layout_and_recomputed_ones_have_the_same_gradients() -> None:
    module = norm_of(LlamaRMSNorm)
    states, gradient = torch.randn(96, 7, 5), torch.randn(5, 7, 96)
    results = []
    for quick, recomputed in ((False, False), (True, False), (True, True)):
        given = states.clone().requires_grad_()
        with fast(module) if quick else nullcontext():
            turned = given.transpose(0, 2)  # not contiguous
            output = checkpoint(module, turned, use_reentrant=False) if recomputed else module(turned)
            output.backward(gradient.transpose(0, 1).contiguous().transpose(0, 1))
        results.append((output.detach(), given.grad))
    for output, slope in results[1:]:
        torch.testing.assert_close(output, results[0][0])
        torch.testing.assert_close(slope, results[0][1], rtol=2e-5, atol=2e-6)
    assert torch.equal(results[1][1], results[2][1])  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_plan_for_another_device_has_its_norms(target: str) -> None:
    tiny = tiny_backbone("llama")
    skeleton = Skeleton(tiny.model, tiny.tokenizer, "causal")
    skeleton.target = target  # type: ignore[assignment]
    with fast_norms(skeleton) as count:
        assert count == (5 if target == "cpu" else 0)


@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.parametrize(("name", "norms"), [("llama", 5), ("t5", 12), ("bert", 0)])
def test_norms_of_a_backbone_are_found(name: str, norms: int, precision: str) -> None:
    backbone = tiny_backbone(name, precision=precision)
    model = MarkupModel(backbone)
    episode = MarkupModel.episode(["lost card", "weather"], [("will it rain", "weather")])
    prompt = model.markup.compose(replace(episode, queries=(Query("is it cold", 1),)))
    assert model.table is not None
    results = []
    for quick in (False, True):
        with fast_norms(backbone) if quick else nullcontext(norms) as count:
            terms = model.loss_terms([prompt], [episode], True)
        assert count == norms
        torch.nn.functional.cross_entropy(terms.scores, terms.targets).backward()
        assert model.table.rows.grad is not None
        results.append((terms.scores.detach(), model.table.rows.grad.clone()))
        model.table.rows.grad = None
    (scores, slope), (fast_scores, fast_slope) = results
    assert torch.equal(scores, fast_scores)
    assert slope.any()
    # Where states are rounded to bf16 on the way back, what differs in its last digit may be rounded the other way.
    close = 1e-4 if precision == "none" else 0.05
    torch.testing.assert_close(fast_slope, slope, rtol=close, atol=close * float(slope.abs().max()))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_warm_up_uses_them_and_finds_the_same_tags(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    @contextmanager
    def counted(backbone: Backbone) -> Iterator[None]:
        with fast_norms(backbone) as count:
            counts.append(count)
            yield

    monkeypatch.setattr("icl_markup.preparation.fast_norms", counted)
    fast_tags = warm_up(tmp_path / "fast", backbone=tiny_backbone(name)).model.table
    monkeypatch.setattr("icl_markup.preparation.fast_norms", lambda _backbone: nullcontext())
    tags = warm_up(tmp_path / "plain", backbone=tiny_backbone(name)).model.table
    assert counts and counts[0] > 0
    assert tags is not None and fast_tags is not None
    torch.testing.assert_close(fast_tags.frozen, tags.frozen, rtol=1e-3, atol=1e-5)
