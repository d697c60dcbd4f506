#!/bin/sh
# Makes every number of results/ again, from the data in ../shared/data: hours on two cores. It can be stopped at any
# time: finished cells and warm-ups under runs/ are kept, and the same command goes on from there.
set -e
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
for experiment in tuning news intent open_world intent_full legal sensitivity ablation; do
  icl-markup evaluate "configs/experiments/$experiment.yaml"
done
python scripts/mechanics.py results/mechanics.jsonl
python scripts/classifier_calibration.py results/classifier.jsonl
icl-markup report results/*.jsonl --out results/README.md
