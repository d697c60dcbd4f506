"""Readers given damaged input return or raise a `MarkupError`: a short run of what `scripts/fuzz.py` runs for hours."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS, seeds

SHORT = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
PIECES = (
    b"", b"\0", b"\n", b"\r", b'"', b"'", b",", b"a", b"{", b"}", b"[", b"]", b"<", b">", b"@", b"\\", b"-1", b"1e999",
    b"NaN", b"null", b"true", b"9" * 5000, b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"\xed\xa0\x80",
    b"\\ud800", b"!!python/x",
    b"&a [*a]", b"<<: *a", b": :", b"\xef\xbb\xbf", b"@tag <x>", b"width=0", b"{text}",
)  # fmt: skip


@cache
def beginnings(name: str) -> list[bytes]:
    return [*seeds(name), b"", b"\1", b"\x80"]


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A valid input in which some places are overwritten, cut out, doubled or filled with what readers stumble over."""
    data = draw(st.sampled_from(beginnings(name)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 2, 4, 16, 400))))
        new = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=8), st.just(data[start:end] * 2)))
        data = data[:start] + new + data[end:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@SHORT
@given(data=st.data())
def test_damaged_input_is_read_or_refused(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(damaged(name)))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_and_every_length_of_them_too(name: str) -> None:
    for data in list(seeds(name))[-2:]:
        for length in range(0, len(data) + 1, max(1, len(data) // 60)):
            TARGETS[name](data[:length])


FOUND: dict[str, list[bytes]] = {
    "task": [b"\0" + b"[" * 100_000, b'\0{"text": "a", "label": ' + b"[" * 100_000],
    "folder": [b"[" * 100_000 + b"\0"],
    "answers": [b"[" * 100_000 + b"\n", b'{"text": ' + b'{"a":' * 50_000 + b"\n"],
    "metrics": [b"1\n", b'{"loss": 1}\n', b'{"step": "a"}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"],
}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in FOUND.items() for data in found])
def test_what_was_found_before_is_refused(name: str, data: bytes) -> None:
    TARGETS[name](data)
