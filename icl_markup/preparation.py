"""What a frozen backbone is given for the time in which tags are trained through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from icl_markup.backbone import Backbone
from icl_markup.casts import cast_once


@contextmanager
def prepared(backbone: Backbone) -> Iterator[int]:
    """While active, a frozen backbone has what many steps share: casts of its weights.

    Yields:
        The bytes of the casts.
    """
    with cast_once(backbone) as casts:
        yield casts
