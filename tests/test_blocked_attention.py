"""Attention in blocks: the gradients of attention in fp32, to the rounding of bf16, whatever is masked or added."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from icl_markup import attention_gradients as module
from icl_markup.blocked_attention import LONG, blocked_attention, padded_to_the_right

PROMPTS, HEADS, WIDTH = 3, 4, 16


def vectors(length: int, heads: int = HEADS, seed: int = 0, prompts: int = PROMPTS) -> Tensor:
    """Return vectors in the layout that layers have them in."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, length, heads, WIDTH, generator=generator).bfloat16().transpose(1, 2)


def gradients(attend: Any, given: list[Tensor], towards: Tensor, **named: Any) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    leaves = [one.detach().clone().requires_grad_() for one in given]
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=given[0].shape[1] // given[1].shape[1])
    output, _ = attend(layer, *leaves, named.pop("mask", None), **named)
    (output * towards.to(output.dtype)).sum().backward()
    return [output.detach(), *(one.grad for one in leaves)]  # type: ignore[misc]


def agrees(given: list[Tensor], **named: Any) -> None:
    """Check blocks against attention in fp32: no further from it than PyTorch's own attention in bf16, nearly."""
    towards = torch.randn(given[0].transpose(1, 2).shape, generator=torch.Generator().manual_seed(9))
    ours = gradients(blocked_attention, given, towards, **named)
    exact = {
        key: one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for key, one in named.items()
    }
    wanted = gradients(sdpa_attention_forward, [one.float() for one in given], towards, **exact)
    for mine, right in zip(ours, wanted, strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == right.shape
        assert float((mine.float() - right).norm()) <= 0.015 * float(right.norm())


def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each block whose gradients are computed."""
    seen: list[int] = []
    original = module.gradients_of_heads

    def note(*given: Tensor) -> Any:
        seen.append(len(given[0]))
        return original(*given)

    monkeypatch.setattr(module, "gradients_of_heads", note)
    return seen


@pytest.mark.parametrize("block", [1, 2**12, 2**14, 2**30])
@pytest.mark.parametrize("causal", [True, False])
def test_all_tokens_or_those_before(block: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    seen = called(monkeypatch)
    agrees([vectors(37, seed=s) for s in range(3)], is_causal=causal)
    assert sum(seen) == PROMPTS * HEADS  # each head once, in however many blocks
    assert (len(seen) == 1) == (block == 2**30)


@pytest.mark.parametrize("block", [1, 2**12, 2**30])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_masks_of_either_kind(heads: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    given = [vectors(20, seed=0), vectors(33, seed=1), vectors(33, seed=2)]
    visible = torch.rand(PROMPTS, heads, 20, 33, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[..., 0] = True
    agrees(given, mask=visible)
    agrees(given, mask=torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.bfloat16).min))
    agrees(given, mask=torch.zeros(visible.shape).masked_fill(~visible, float("-inf")))
    agrees(given, mask=visible[:1, :, :1].expand(PROMPTS, -1, 20, -1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [(40, 17, 1), (40, 40, 31)])
def test_relative_position_biases(lengths: tuple[int, ...], padded: bool) -> None:
    given = [vectors(40, seed=s) for s in range(3)]
    bias = torch.randn(1, HEADS, 40, 40, generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    square = mask.bool()[:, None, None].expand(-1, 1, 40, -1)
    agrees(given, position_bias=bias, is_causal=False)
    agrees(given, position_bias=bias, is_causal=True)
    with padded_to_the_right(mask if padded else None):
        agrees(given, position_bias=bias, mask=square)


def test_padding_is_hidden_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [vectors(40, seed=s) for s in range(3)]
    mask = (torch.arange(40) < torch.tensor([13, 40, 26])[:, None]).long()
    square = mask.bool()[:, None, None].expand(-1, 1, 40, -1)
    sums: list[Any] = []
    original = module._Added.of
    monkeypatch.setattr(module._Added, "of", lambda *given: sums.append(original(*given)) or sums[-1])
    with padded_to_the_right(mask):
        agrees(given, mask=square)
        assert not sums[-1].parts and sums[-1].lengths == (13, 40, 26)
        more = square & (torch.arange(40) != 5)  # says something else besides
        agrees(given, mask=more)
        assert sums[-1].parts and sums[-1].lengths is None
    with padded_to_the_right(mask.flip(1)):  # is on the left
        agrees(given, mask=square.flip(3))
        assert sums[-1].parts and sums[-1].lengths is None
    agrees(given, mask=square)
    assert sums[-1].parts and sums[-1].lengths is None


def test_several_queries_heads_share_keys() -> None:
    agrees([vectors(24, seed=0), vectors(24, heads=2, seed=1), vectors(24, heads=2, seed=2)], is_causal=True)


def test_more_keys_than_queries_under_a_causal_mask_are_not_seen() -> None:
    agrees([vectors(24, seed=0), vectors(30, seed=1), vectors(30, seed=2)], is_causal=True)


def test_a_query_that_sees_nothing_moves_nothing() -> None:
    given = [vectors(12, seed=s) for s in range(3)]
    visible = torch.ones(PROMPTS, 1, 12, 12, dtype=torch.bool)
    visible[0, 0, 3] = False
    towards = torch.zeros(PROMPTS, 12, HEADS, WIDTH)
    towards[0, 3] = 1.0
    for mask in (visible, torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))):
        _, *found = gradients(blocked_attention, given, towards, mask=mask)
        assert all(not one.any() for one in found)


def test_what_needs_no_gradient_or_another_one_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = called(monkeypatch)
    given = [vectors(20, seed=s) for s in range(3)]
    towards = torch.ones(PROMPTS, 20, HEADS, WIDTH)
    with torch.no_grad():
        layer = SimpleNamespace(is_causal=True, num_key_value_groups=1)
        mine, _ = blocked_attention(layer, *given, None)  # type: ignore[arg-type]
        theirs, _ = sdpa_attention_forward(layer, *given, None)  # type: ignore[arg-type]
        assert torch.equal(mine, theirs)
    single = [one.float() for one in given]
    for one, other in zip(
        gradients(blocked_attention, single, towards), gradients(sdpa_attention_forward, single, towards), strict=True
    ):
        assert torch.equal(one, other)
    bias = torch.zeros(1, HEADS, 20, 20, requires_grad=True)
    gradients(blocked_attention, given, towards, position_bias=bias, is_causal=False)
    assert bias.grad is not None
    gradients(blocked_attention, given, towards, dropout=0.5)
    long = [vectors(LONG, heads=1, seed=s, prompts=1) for s in range(3)]
    gradients(blocked_attention, long, torch.ones(1, LONG, 1, WIDTH))
    assert not seen
    gradients(blocked_attention, given, towards)
    assert seen


def test_gradients_are_the_same_bits_each_time() -> None:
    given = [vectors(61, seed=s) for s in range(3)]
    towards = torch.randn(PROMPTS, 61, HEADS, WIDTH)
    runs = [gradients(blocked_attention, given, towards) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
