"""A backbone without weights: its configuration and tokenizer, and fake tensors in the shapes of its parameters.

Operations on fake tensors compute shapes and types, and no numbers. Token ids, masks and positions are real, so that
what depends on them (which tokens are read, whether a mask is needed) happens as in a run.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from icl_markup.backbone import Backbone
from icl_markup.errors import BackboneError
from icl_markup.exactness import Exactness, longest_exact
from icl_markup.loading import AUTO_CLASSES, BackboneConfig, checkpoint_gradients, read_source, settled
from icl_markup.quantisation import form_of, packed_bytes

Target = Literal["cpu", "cuda", "cuda without bf16"]
"""What a plan is for: it decides what ``auto`` stands for in a backbone's configuration."""


class Skeleton(Backbone):
    """A backbone on fake tensors, of which no answer can be read.

    Attributes:
        target: what the plan is for.
        dtype: the type of its weights, where they are not quantised.
        form: how its linear layers will be quantised; ``none`` where they will not.
        weight_bytes: the bytes of all weights and buffers, quantised or not; what is tied counts once.
    """

    target: Target
    dtype: torch.dtype
    form: str
    weight_bytes: int

    @classmethod
    def build(cls, config: BackboneConfig, target: Target = "cpu") -> Skeleton:
        """Build one of a folder or hub name, of which ``config.json`` and the tokenizer are enough.

        Raises:
            BackboneError: there is no such configuration or tokenizer, or transformers cannot build such a model.
        """
        source = read_source(config)
        device = torch.device("cpu" if target == "cpu" else "cuda")
        plan = settled(config, source, device, has_bf16=target != "cuda without bf16")
        options = {} if plan.attention is None else {"attn_implementation": plan.attention}
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with fake:
                model = AUTO_CLASSES[source.kind].from_config(source.settings, dtype=plan.dtype, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackboneError(f"backbone {config.name!r} as a {source.kind} model: {reason}") from error
        skeleton = cls(
            model,
            source.tokenizer,
            source.kind,
            name=config.name,
            revision=config.revision,
            precision=plan.precision,
            max_length=config.max_length,
        )
        skeleton.target = target
        skeleton.dtype = plan.dtype
        skeleton.form = form_of(config.quantisation, source.settings)
        skeleton.weight_bytes = packed_bytes(model, skeleton.form)
        if config.gradient_checkpointing:
            checkpoint_gradients(model)
        return skeleton

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Taken for granted where the configuration does not speak against it; a run checks it."""
        if self.kind != "causal":
            return Exactness(0)
        return Exactness(longest_exact(self.model.config))

    @property
    def sees_nothing_ahead(self) -> bool:  # type: ignore[override]
        """Likewise."""
        return self.kind == "causal"

    @property
    def shares_names(self) -> bool:
        """Likewise."""
        if self.kind == "seq2seq":
            return not self._recomputes
        return self.exactness.limit > 0

    @property
    def runs_on_cpu(self) -> bool:
        """Whether the device that is planned for is a CPU; fake tensors say that they lie on one in any case."""
        return self.target == "cpu"

    def _check(self) -> None:
        """There are no logits to compare."""
