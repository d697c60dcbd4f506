"""Accelerators by name, and the time that operations would take on one: a roofline, with a stated share of the peak.

The numbers are those of the vendors' data sheets, without sparsity. What a program reaches of them is an assumption
here: nothing of this table was measured by us. A machine at hand is measured instead (`icl_markup.replay`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from icl_markup.errors import ConfigError, nearest
from icl_markup.ledger import Operation, Phase

MATRIX_SHARE = 0.5
"""Assumed: the share of the peak that products of matrices reach."""

BANDWIDTH_SHARE = 0.7
"""Assumed: the share of the memory's bandwidth that all other operations reach."""

LAUNCH_SECONDS = 10e-6
"""Assumed: the time in which Python gives an accelerator one operation; small batches wait for it."""

REDUCTION_SECONDS = 200e-6
"""Assumed: the time in which processes add up the tags' gradients, which are kilobytes, after a step."""

CONTEXT_GIB = 1.0
"""Assumed: what the driver, the libraries and the allocator's gaps take of an accelerator's memory, GiB."""


@dataclass(frozen=True)
class Accelerator:
    """An accelerator.

    Attributes:
        name: what it is called on the command line.
        half: peak of products of 16-bit numbers with fp32 sums, 10¹² operations a second.
        single: the same for fp32 (without TF32, which PyTorch leaves off).
        memory: GiB.
        bandwidth: of that memory, 10⁹ bytes a second.
        has_bf16: whether it computes in bf16.
    """

    name: str
    half: float
    single: float
    memory: int
    bandwidth: float
    has_bf16: bool = True


_ALL = (
    # NVIDIA T4 data sheet, 2019.
    Accelerator("t4", 65.0, 8.1, 16, 320, has_bf16=False),
    # NVIDIA V100 data sheet, 2020: SXM2.
    Accelerator("v100-16", 125.0, 15.7, 16, 900, has_bf16=False),
    Accelerator("v100-32", 125.0, 15.7, 32, 900, has_bf16=False),
    # NVIDIA A10 data sheet, 2021.
    Accelerator("a10", 125.0, 31.2, 24, 600),
    # NVIDIA A100 data sheet, 2021: SXM4.
    Accelerator("a100-40", 312.0, 19.5, 40, 1555),
    Accelerator("a100-80", 312.0, 19.5, 80, 2039),
    # NVIDIA L4 data sheet, 2023: half of the 242 with sparsity.
    Accelerator("l4", 121.0, 30.3, 24, 300),
    # NVIDIA L40S data sheet, 2023: half of the 733 with sparsity.
    Accelerator("l40s", 366.0, 91.6, 48, 864),
    # NVIDIA GA102 whitepaper, 2021, appendix: 16-bit products with fp32 sums.
    Accelerator("rtx3090", 71.0, 35.6, 24, 936),
    # NVIDIA Ada whitepaper, 2023, appendix: 16-bit products with fp32 sums.
    Accelerator("rtx4090", 165.2, 82.6, 24, 1008),
    # NVIDIA H100 data sheet, 2023: half of what is given with sparsity; SXM5, then PCIe.
    Accelerator("h100", 989.5, 67.0, 80, 3350),
    Accelerator("h100-pcie", 756.5, 51.0, 80, 2000),
    # NVIDIA H200 data sheet, 2024: SXM.
    Accelerator("h200", 989.5, 67.0, 141, 4800),
    # AMD Instinct MI300X data sheet, 2023.
    Accelerator("mi300x", 1307.4, 163.4, 192, 5300),
)
ACCELERATORS = {one.name: one for one in _ALL}
"""Accelerators by name."""


def accelerator(name: str) -> Accelerator:
    """Return an accelerator.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in ACCELERATORS:
        raise ConfigError(
            f"--accelerators: {name!r} is not known{nearest(name, ACCELERATORS)}; there are here (this machine, which "
            f"is measured), {', '.join(ACCELERATORS)}"
        )
    return ACCELERATORS[name]


def roofline(operations: Iterable[Operation], on: Accelerator, *phases: Phase) -> float:
    """Return the seconds that operations take: each waits for its arithmetic or its memory, all of them for Python.

    Args:
        operations: the operations.
        on: the accelerator.
        phases: count calls of these phases alone; none given: all.
    """
    busy, calls = 0.0, 0
    for one in operations:
        times = one.times(*phases)
        peak = (on.half if one.half else on.single) * 1e12 * MATRIX_SHARE
        busy += times * max(one.flops / peak, one.moved / (on.bandwidth * 1e9 * BANDWIDTH_SHARE))
        calls += times
    return max(busy, calls * LAUNCH_SECONDS)
