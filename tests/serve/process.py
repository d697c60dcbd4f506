"""`icl-markup serve` as a process, for tests of how it begins, ends, and bears many connections."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path


class Command:
    """`icl-markup serve` as a process, on a free port."""

    program: tuple[str, ...] = ("-m", "icl_markup.cli")

    def __init__(self, folder: Path, *options: str, **environment: str):
        command = [sys.executable, *self.program, "serve", "--classifier", str(folder), "--port", "0"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env=variables, cwd=Path(__file__).parents[2]
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:(\d+))", line):
                self.url, self.port = found[1], int(found[2])
                threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True).start()
                return
        raise AssertionError("".join(self.log))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class StuckCommand(Command):
    """The same, with a model that never answers a text that begins with ``stuck``."""

    program = (
        "-c",
        "import sys, time\n"
        "from icl_markup import MarkupClassifier\n"
        "from icl_markup.cli import main\n"
        "whole = MarkupClassifier.predict_proba\n"
        "def stuck(self, texts):\n"
        "    while any(text.startswith('stuck') for text in texts):\n"
        "        time.sleep(0.05)\n"
        "    return whole(self, texts)\n"
        "MarkupClassifier.predict_proba = stuck\n"
        "sys.exit(main(sys.argv[1:]))\n",
    )
