#!/bin/bash
# CE, Focal and GHM-C with a limit on 750 demo scenes, as in wrong_labels.sh without wrong labels, but in float32: once
# with weights that were tuned with seed 0, and once with weights tuned again for each seed. Stop it at any time; the
# same command continues. Arguments: runs at once (1), seeds (3).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-3}

python -m data.demo --output datasets/demo
study=(python scripts/ablate.py --config configs/demo_long/base.yaml --variants ce focal ghm_c_limited
    --seeds "$seeds" --jobs "$jobs" --tune 8 --set data.workers=0 tensorboard.images=0 precision=float32)
"${study[@]}" --output runs/tuning/once --results results/tuning/once
mkdir -p results/tuning/each_seed
for loss in ce focal ghm_c_limited; do # seed 0 is the same
    cp -n results/tuning/once/"tune-$loss"-*.json results/tuning/once/"$loss-s0.json" results/tuning/each_seed
done
"${study[@]}" --tune-each-seed --output runs/tuning/each_seed --results results/tuning/each_seed
for folder in once each_seed; do
    python scripts/compare.py results/tuning/$folder --baseline ce --pairs
done
