"""Lines that other libraries write about kernels that nothing here needs are dropped, and no others."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import icl_markup  # noqa: F401

DROPPED = [
    ("torchao", "Failed to load /x/site-packages/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load"),
    ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: No module named"),
]


@pytest.mark.parametrize(("name", "line"), DROPPED)
def test_exactly_these_lines_are_dropped(name: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    for text in (line, f"now {line}", line.replace("Failed", "Succeeded").replace("KernelPreference", "Mine")):
        with caplog.at_level(logging.WARNING):
            logger.handle(logging.LogRecord(name, logging.WARNING, "", 0, text, (), None))
    assert [record.getMessage() for record in caplog.records] == [
        f"now {line}",
        line.replace("Failed", "Succeeded").replace("KernelPreference", "Mine"),
    ]


def test_help_is_all_that_help_writes() -> None:
    code = "import sys; from icl_markup.cli import main; sys.exit(main(['predict', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""
