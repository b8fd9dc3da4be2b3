#!/bin/bash
# CE, Focal and GHM-C with a limit, trained without, with 20% and with 40% wrong labels and scored on right ones; 564
# steps of 4 images a run. At each percentage, runs of as many epochs tune each loss's class and box weight. They are
# scored on a quarter of the training images, whose labels are as wrong as the rest: we assume that nobody has checked
# any. Stop it at any time; the same command continues. Arguments: runs at once (1), seeds (5), and the only percentage
# to train with (all).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-5}

for share in ${3:-0 20 40}; do
    data=datasets/demo$share
    python -m data.demo --output "$data" --wrong-labels "$(printf 0.%02d "$share")"
    python scripts/ablate.py --config configs/demo_long/base.yaml --variants ce focal ghm_c_limited --seeds "$seeds" \
        --jobs "$jobs" --tune 8 --output "runs/wrong_labels/$share" --results "results/wrong_labels/$share" \
        --set "data.train.annotations=$data/train.json" "data.train.images=$data/train" \
        "data.val.annotations=$data/val.json" "data.val.images=$data/val" \
        data.workers=0 tensorboard.images=0 precision=bfloat16
done
[ -z "${3:-}" ] || exit 0 # a picture needs all conditions
python scripts/compare_conditions.py results/wrong_labels --condition "wrong training labels, percent" \
    --output docs/noise.png
