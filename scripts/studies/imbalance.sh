#!/bin/bash
# AP of CE, Focal and GHM-C against the ratio of positives to negatives, on digits of one size.
# Each line: negative anchors for each positive one (scripts/check_data.py), scene, digits in a scene. Each run has 750
# steps of 4 images. At each ratio, runs of as many epochs tune each loss's class and box weight, because weights that
# suit one ratio may not suit another. Stop it at any time; the same command continues. Arguments: runs at once (1), seeds
# (3), and the only ratio to train for (all).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-3} only=${3:-}

while read -r ratio width height fewest most; do
    [[ $ratio == "${only:-$ratio}" ]] || continue
    data=datasets/imbalance/$ratio
    python -m data.demo --quick --output "$data" --train-images 1500 --val-images 400 \
        --size "$width" "$height" --objects "$fewest" "$most" --digit-size 10 12
    train=(python scripts/ablate.py --config configs/demo/base.yaml --seeds "$seeds" --jobs "$jobs" --tune 8
        --output "runs/imbalance/$ratio" --results "results/imbalance/$ratio"
        --set "data.train.annotations=$data/train.json" "data.train.images=$data/train"
        "data.val.annotations=$data/val.json" "data.val.images=$data/val"
        "data.short_side=$height" "data.long_side=$width" tensorboard.images=0 precision=bfloat16)
    "${train[@]}" --variants ce focal </dev/null
    "${train[@]}" --variants ghm_c --grid class_loss.max_weight=null,30 </dev/null
done <<END
70 160 128 36 52
350 160 128 6 12
1600 160 128 1 3
11000 224 160 0 1
46000 448 320 0 1
END
[ -z "$only" ] || exit 0 # a picture needs all conditions
python scripts/compare_conditions.py results/imbalance --condition "negative anchors for each positive one" --log \
    --output docs/imbalance.png
