#!/bin/bash
# AP of CE, Focal and GHM-C against the ratio of positives to negatives, on digits of one size.
# Each line below: negative anchors for each positive one (scripts/check_data.py), scene, digits in a scene. Each run has
# 750 steps of 4 images. Class and box weights of each loss are tuned at a ratio of 350 with runs of that length, and the
# other ratios take the same. Stop it at any time; the same command continues. Arguments: runs at once (1), seeds (3), and
# the only ratio to train for (all; 350 comes first).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-3} only=${3:-}

while read -r ratio width height fewest most; do
    [[ $ratio == "${only:-$ratio}" ]] || continue
    data=datasets/imbalance/$ratio
    python -m data.demo --quick --out "$data" --train-images 1500 --val-images 400 \
        --size "$width" "$height" --objects "$fewest" "$most" --digit-size 10 12
    train=(python scripts/ablate.py --config configs/demo/base.yaml --seeds "$seeds" --jobs "$jobs"
        --output "runs/imbalance/$ratio" --results "results/imbalance/$ratio"
        --set "data.train.annotations=$data/train.json" "data.train.images=$data/train"
        "data.val.annotations=$data/val.json" "data.val.images=$data/val"
        "data.short_side=$height" "data.long_side=$width" tensorboard.images=0 precision=bfloat16)
    if [ "$ratio" = 350 ]; then
        "${train[@]}" --variants ce focal --tune 8 </dev/null
        "${train[@]}" --variants ghm_c --grid class_loss.max_weight=null,30 --tune 8 </dev/null
        continue
    fi
done <<END
350 160 128 6 12
70 160 128 36 52
1600 160 128 1 3
11000 224 160 0 1
46000 448 320 0 1
END
