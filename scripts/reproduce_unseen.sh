#!/usr/bin/env bash
# Makes results/unseen.jsonl again: three warm-ups, then every method on the same episodes. Both parts continue
# where they were stopped. Needs ../shared/data; takes about half an hour on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
for seed in 0 1 2; do
  icl-markup warmup configs/warmup.yaml --seed "$seed" --output "runs/warmup-$seed" \
    --resume "$([ -e "runs/warmup-$seed/checkpoint.safetensors" ] && echo true || echo false)"
done
icl-markup evaluate configs/experiments/unseen.yaml
