"""What a frozen backbone is given for the time in which tags are trained through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from icl_markup.backbone import Backbone
from icl_markup.casts import cast_once
from icl_markup.norms import fast_norms


@contextmanager
def prepared(backbone: Backbone) -> Iterator[int]:
    """While active, a frozen backbone has what many steps share: casts of its weights, and norms of few passes.

    What a batch alone decides, such as how attention is computed, the backbone sees to itself.

    Yields:
        The bytes of the casts.
    """
    with fast_norms(backbone), cast_once(backbone) as casts:
        yield casts
