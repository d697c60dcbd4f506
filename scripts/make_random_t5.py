"""Builds a Flan-T5-small with random weights from its real configuration and tokenizer, to try the mechanics.

python scripts/make_random_t5.py ../shared/models/flan-t5-tokenizer runs/flan-t5-small-random
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers


def build(source: Path, target: Path, seed: int = 0) -> None:
    """Write the model to `target`; the same seed gives the same weights."""
    transformers.set_seed(seed)
    config = transformers.AutoConfig.from_pretrained(source)
    transformers.T5ForConditionalGeneration(config).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    build(Path(sys.argv[1]), Path(sys.argv[2]))
