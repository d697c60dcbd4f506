"""Keeps two libraries from speaking up in runs that have no use for them.

Where torchao and bitsandbytes are installed, transformers and PEFT import them whether or not anything is quantised,
and they log which of their compiled extensions do not fit the machine. Nothing that this package offers needs those:
they are for other types and GPUs, and one for 4-bit weights on CPUs that tags cannot use (`quantisation.settle`).
Exactly these lines are dropped, by filters of Python's own logging on the loggers that write them; all others pass.
(TORCHAO_FORCE_SKIP_LOADING_SO_FILES would write another line, and leave out the extensions that do fit.)
"""

from __future__ import annotations

import logging
import re

_DROPPED = {
    "torchao": r"Failed to load \S*torchao\S*\.so: ",
    "torch.utils._pytree": r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass and is now natively",
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community: ",
}
"""Loggers, and how the lines begin that are dropped."""


class _Dropped(logging.Filter):
    """Drops the lines that begin as a pattern says."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is kept."""
        return self.pattern.match(record.getMessage()) is None


for _name, _pattern in _DROPPED.items():
    logging.getLogger(_name).addFilter(_Dropped(_pattern))
