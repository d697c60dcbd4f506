"""Adversarial texts, the same in every run: what might be taken for markup, in every disguise that Unicode has."""

from __future__ import annotations

import html
import random
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable
from itertools import product

TAGS = ("<classification>", "<options>", "<demo>", "<input>", "<label>", "</label>", "<opt>", "<is>")
SPECIALS = (
    "<s>", "</s>", "<pad>", "<unk>", "<mask>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>",
    "<extra_id_1>", "<extra_id_99>", "<|endoftext|>", "<|im_start|>user", "<|im_end|>", "<|begin_of_text|>",
    "<|eot_id|>", "<|start_header_id|>system<|end_header_id|>", "<bos>", "<eos>", "<start_of_turn>", "[INST]",
    "<<SYS>>", "[unused0]", "[unused99]", "<|mask|>", "<sep>", "<cls>",
)  # fmt: skip
BYTES = (
    "<0x0A>", "<0x3C>demo<0x3E>", "<0x3C><0x2F><0x73><0x3E>", "<0x00>", "<0xE2><0x96><0x81>", "<0xFF>", "\u2581<s>",
    "\u2581", "\u0120<s>", "\u0120\u010a", "##s", "##[MASK]", "\ufffd", "Ã©", "\u2581\u2581<extra_id_0>",
    "\x00", "\x7f",
)  # fmt: skip
SYNTAX = (
    "{text}", "{label}", "{symbol}: {name}", "{task}", "{{label}}", "@query", "@query\n{text} <label> {label}",
    "@tag <x> width=1000", "@tail\n<label>", "# a comment", "\\n", "\\<", "\\{label\\}",
    "{% for x in y %}{{x}}{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "${label}", "%s%n", "A: lost card", "F: none of the above", " B", "none of the above",
    "I lost my card", "日本語のテキスト", "👩‍👩‍👧", "ﬁ", "e\u0301", "\u202e<demo>\u202c",
)  # fmt: skip
_CYRILLIC = str.maketrans("aceopxyiBAE", "асеорхуіВАЕ")


def _letters(start: int) -> Callable[[str], str]:
    """Letters of a mathematical alphabet, which NFKC turns into plain ones."""
    return lambda text: "".join(chr(start + ord(c) - ord("a")) if c.islower() and c.isascii() else c for c in text)


DISGUISES: tuple[Callable[[str], str], ...] = (
    lambda t: t,
    str.upper,
    str.title,
    lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),  # fullwidth
    lambda t: t.replace("<", "﹤").replace(">", "﹥"),
    lambda t: t.replace("<", "‹").replace(">", "›"),
    lambda t: t.replace("<", "〈").replace(">", "〉"),
    lambda t: t.replace("<", "<\u0338").replace(">", ">\u0338"),
    lambda t: t.translate(_CYRILLIC),
    _letters(0x1D41A),
    _letters(0x1D5EE),
    "\u200b".join,
    "\u200d".join,
    "\u00ad".join,
    lambda t: "\ufeff" + t + "\u2060",
    lambda t: "\u202e" + t[::-1] + "\u202c",
    lambda t: t + "".join(chr(0xE0000 + ord(c)) for c in t if c.isascii()),  # tag characters
    " ".join,
    lambda t: t.replace("<", "< ").replace(">", " >"),
    lambda t: t.replace("<", "<<").replace(">", ">>"),
    html.escape,
    urllib.parse.quote,
    lambda t: t.encode("unicode_escape").decode() if not t.isascii() else "".join(f"\\u{ord(c):04x}" for c in t),
    lambda t: "".join(f"<0x{b:02X}>" for b in t.encode()),
    lambda t: "".join(c + "\u0301" if c.isalpha() else c for c in t),
    lambda t: unicodedata.normalize("NFD", t),
)
_AROUND = ("{}", "a{}b", " {} ", "{0}{0}", "I lost my card {}", "{} A\n", "\t{}\r\n{}", "'\"{}\"'")


def adversarial_texts(count: int, more: Iterable[str] = ()) -> list[str]:
    """Return that many different texts, none of them blank; `more` are a tokenizer's own tokens."""
    bases = list(dict.fromkeys([*TAGS, *more, *SPECIALS, *BYTES, *SYNTAX]))
    rng = random.Random(1)
    found: dict[str, None] = {}
    for base, disguise in product(bases, DISGUISES):
        text = disguise(base)
        for around in _AROUND:
            found.setdefault(around.replace("{0}", text).replace("{}", text))
    while len(found) < count:
        parts = [rng.choice(DISGUISES)(rng.choice(bases)) for _ in range(rng.randint(2, 5))]
        found.setdefault(rng.choice(("", " ", "\n", "\u3000")).join(parts))
    texts = [text for text in found if text.strip()]
    plain = [text for text in texts if text in bases]
    return plain + rng.sample([text for text in texts if text not in bases], count - len(plain))
