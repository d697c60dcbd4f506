"""Fuzz every reader with atheris (coverage-guided, libFuzzer), and write a row of results for each.

    pip install atheris
    python scripts/fuzz.py results/bench/robustness.jsonl --seconds 3600 --work runs/fuzz

An input on which a reader does anything else than return or raise a `MarkupError` is kept in the work folder, as
``TARGET-crash-…``; it becomes a test in `tests/test_fuzz.py`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run every target in a process of its own, one after the other, or one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", help="a JSONL file to append a row a target to")
    parser.add_argument("--seconds", type=int, default=3600, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", default="runs/fuzz", help="the folder for inputs that were found")
    parser.add_argument("--targets", nargs="*", help="some targets only")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    work = Path(args.work)
    if args.here:
        _fuzz(args.here, work, args.seconds, args.seed)
        return
    from icl_markup.results import provenance, write_rows
    from tests.fuzz_targets import TARGETS

    command = f"python scripts/fuzz.py {args.rows} --seconds {args.seconds} --seed {args.seed}"
    for name in args.targets or TARGETS:
        log = work / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--here", name], stdout=out, stderr=out, check=False
            )
        told = log.read_text(errors="replace")
        executed = re.findall(r"^stat::number_of_executed_units:\s*(\d+)", told, re.M) or re.findall(
            r"^#(\d+)", told, re.M
        )
        row = {
            "experiment": "robustness",
            "what": f"fuzz {name}",
            "engine": f"atheris {version('atheris')}",
            "seed": args.seed,
            "seconds": args.seconds,
            "executions": int(executed[-1]) if executed else 0,
            "findings": int(done.returncode != 0),
            "command": command,
            **provenance(),
        }
        write_rows(Path(args.rows), [row])
        print(f"{name}: {row['executions']} executions, {row['findings']} findings", flush=True)


def _fuzz(name: str, work: Path, seconds: int, seed: int) -> None:
    import atheris

    import icl_markup  # noqa: F401 (heavy libraries are imported before, and not instrumented)

    for module in [m for m in sys.modules if m.startswith("icl_markup.")]:
        del sys.modules[module]
    del sys.modules["icl_markup"]
    with atheris.instrument_imports(include=["icl_markup"]):
        from tests.fuzz_targets import TARGETS, seeds

    corpus = work / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [f"-max_total_time={seconds}", f"-seed={seed}", "-print_final_stats=1", "-max_len=8192", "-timeout=20"]
    options += [f"-artifact_prefix={work / name}-", "-rss_limit_mb=6000", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
