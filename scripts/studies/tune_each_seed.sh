#!/bin/bash
# CE, Focal and GHM-C with a limit on quick demo scenes, with weights tuned again for each seed, and with the weights
# that were tuned with seed 0. Stop it at any time; the same command continues. Arguments: runs at once (1), seeds (3).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-3}

python -m data.demo --quick
study=(python scripts/ablate.py --config configs/demo/base.yaml --variants ce focal ghm_c_limited --seeds "$seeds"
    --jobs "$jobs" --tune 8 --set data.workers=0 tensorboard.images=0 precision=float32)
"${study[@]}" --tune-each-seed --output runs/tuning/each_seed --results results/tuning/each_seed
mkdir -p results/tuning/once
for loss in ce focal ghm_c_limited; do # seed 0 is the same
    cp -n results/tuning/each_seed/{"tune-$loss"-[1-8],"$loss-s0"}.json results/tuning/once
done
"${study[@]}" --output runs/tuning/once --results results/tuning/once
for folder in each_seed once; do
    python scripts/compare.py results/tuning/$folder --baseline ce --pairs
done
