"""What is kept for the backward pass: less, and gradients stay what they were."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.activations import ACT2FN

from icl_markup.activations import lean_activations
from icl_markup.batching import Batch
from icl_markup.episodes import Query
from icl_markup.model import MarkupModel
from tests.conftest import tiny_backbone


class Gated(nn.Module):
    """The feed-forward layer of Llama, Gemma and T5, frozen."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(0)
        self.act_fn: Callable[[Tensor], Tensor] = ACT2FN[name]
        self.gate, self.up, self.down = nn.Linear(8, 64), nn.Linear(8, 64), nn.Linear(64, 8)
        self.requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down(self.act_fn(self.gate(states)) * self.up(states))


@contextmanager
def counted(sizes: dict[int, int]) -> Iterator[None]:
    """Note the bytes of everything that is kept until the end, each storage once."""
    kept: dict[int, StorageWeakRef] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()], kept[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)
        return tensor

    # Autograd asks the hooks registered last alone, so ours count what the others leave: tensors alone.
    original = torch.autograd.graph.saved_tensors_hooks.__init__

    def init(self: object, pack: Callable[[Tensor], object], unpack: Callable[[object], Tensor]) -> None:
        def both(tensor: Tensor) -> object:
            packed = pack(tensor)
            return note(packed) if isinstance(packed, Tensor) else packed

        original(self, both, unpack)

    torch.autograd.graph.saved_tensors_hooks.__init__ = init  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            yield
        for place in [place for place, one in kept.items() if one.expired()]:
            del sizes[place]  # of a gradient that was computed in between
    finally:
        torch.autograd.graph.saved_tensors_hooks.__init__ = original  # type: ignore[method-assign]


def passed(module: nn.Module, *, lean: bool) -> tuple[Tensor, Tensor, int]:
    """Return output, gradient, and the bytes kept."""
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sizes: dict[int, int] = {}
    with counted(sizes), lean_activations(module) if lean else nullcontext():
        output = module(states)
    output.pow(2).sum().backward()
    assert states.grad is not None
    return output.detach(), states.grad, sum(sizes.values())


LESS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "mish")


@pytest.mark.parametrize("name", [*LESS, "relu", "tanh", "gelu_python"])
def test_gradients_are_equal_to_the_bit_and_less_is_kept(name: str) -> None:
    module = Gated(name)
    output, gradient, kept = passed(module, lean=False)
    lean_output, lean_gradient, lean_kept = passed(module, lean=True)
    assert torch.equal(output, lean_output) and torch.equal(gradient, lean_gradient)
    assert lean_kept < kept if name in LESS else lean_kept == kept


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_the_tanh_form_of_gelu_is_computed_by_one_function(name: str) -> None:
    module = Gated(name)
    output, gradient, kept = passed(module, lean=False)
    lean_output, lean_gradient, lean_kept = passed(module, lean=True)
    torch.testing.assert_close(lean_output, output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lean_gradient, gradient, rtol=1e-5, atol=1e-6)
    assert lean_kept <= kept / 2


def test_functions_are_as_they_were_afterwards_and_unchanged_without_gradients() -> None:
    module = Gated("gelu_new")
    states = torch.randn(4, 8)
    before = module(states)
    with lean_activations(module):
        assert torch.equal(module(states), before)  # nothing requires a gradient
    assert "forward" not in vars(module.act_fn)
    with pytest.raises(ZeroDivisionError), lean_activations(module):
        raise ZeroDivisionError
    assert "forward" not in vars(module.act_fn)


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_tags_get_the_gradient_that_they_got_before(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MarkupModel(tiny_backbone(kind))
    assert model.table is not None
    episode = MarkupModel.episode(["lost card", "weather"], [("will it rain", "weather")])
    prompts = [model.markup.compose(replace(episode, queries=(Query(text),))) for text in ("it is cold", "my card")]
    batch = Batch.of_prompts(prompts, model.pad_id)

    def gradient() -> Tensor:
        model.table.rows.grad = None
        model.backbone.candidate_logits(batch, model.table).logsumexp(-1).sum().backward()
        return model.table.rows.grad.clone()

    lean = gradient()
    monkeypatch.setattr("icl_markup.backbone.lean_activations", lambda _model: nullcontext())
    torch.testing.assert_close(lean, gradient(), rtol=1e-4, atol=1e-6)


def test_what_no_gradient_comes_by_is_not_kept_for_ever() -> None:
    class Aside(Gated):
        def forward(self, states: Tensor) -> Tensor:
            self.aside = torch.tanh(self.gate(states))  # keeps its own output, and nothing is made of it
            return super().forward(states)

    module = Aside("silu")
    states = torch.randn(50, 8).requires_grad_()
    with lean_activations(module):
        module(states).sum().backward()
    storage = weakref.ref(module.aside.untyped_storage())
    del module.aside
    gc.collect()
    assert storage() is None


def test_functions_that_somebody_else_has_replaced_are_left_alone() -> None:
    module = Gated("silu")
    module.act_fn.forward = lambda given: given * 2  # type: ignore[attr-defined]
    mine = module.act_fn.forward  # type: ignore[attr-defined]
    with lean_activations(module):
        assert module.act_fn.forward is mine  # type: ignore[attr-defined]
    assert module.act_fn.forward is mine  # type: ignore[attr-defined]
