#!/bin/bash
# AP of CE, Focal and GHM-C against the ratio of positives to negatives, on digits of one size.
# Each line: folder of the results, whose name is the number of negative anchors for each positive one
# (scripts/check_data.py), scene, digits in a scene, training scenes, epochs, GHM-C's limits, and other forms without a
# limit. few_digits/70 has as many digits to learn from as imbalance/1600. Each run has some 750 steps of 4 images. At
# each ratio, runs of as many epochs tune each loss's class and box weight, because weights that suit one ratio may not
# suit another. Stop it at any time; the same command continues. Arguments: runs at once (1), seeds (3), and the only
# folder to train for (all).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-3} only=${3:-}

while read -r folder width height fewest most scenes epochs limits forms; do
    [[ $folder == "${only:-$folder}" ]] || continue
    data=datasets/$folder
    python -m data.demo --quick --output "$data" --train-images "$scenes" --val-images 400 \
        --size "$width" "$height" --objects "$fewest" "$most" --digit-size 10 12
    train=(python scripts/ablate.py --config configs/demo/base.yaml --seeds "$seeds" --jobs "$jobs" --tune 8
        --output "runs/$folder" --set "data.train.annotations=$data/train.json" "data.train.images=$data/train"
        "data.val.annotations=$data/val.json" "data.val.images=$data/val" "data.short_side=$height" "data.long_side=$width"
        "solver.epochs=$epochs" "evaluation.every=$epochs" tensorboard.images=0 precision=bfloat16)
    "${train[@]}" --results "results/$folder" --variants ce focal </dev/null
    "${train[@]}" --results "results/$folder" --variants ghm_c --grid "class_loss.max_weight=$limits" </dev/null
    for form in $forms; do
        "${train[@]}" --results "results/forms/$folder" --variants ghm_c --grid class_loss.max_weight=null \
            --grid "class_loss.$form" </dev/null
    done
done <<END
imbalance/70 160 128 36 52 1500 2 null,30 prior_count=1000
imbalance/350 160 128 6 12 1500 2 null,30 prior_count=1000 momentum=0
imbalance/1600 160 128 1 3 1500 2 null,30 prior_count=1000 prior_count=100
imbalance/11000 224 160 0 1 1500 2 null,30 prior_count=1000
imbalance/46000 448 320 0 1 1500 2 null,30 prior_count=1000
few_digits/70 160 128 36 52 68 44 30
END
# At 1,600, the weights that tuning chose for a prior count of 100, with two other losses. CE's file has a weight of 1,
# GHM-C's 4.
data=datasets/imbalance/1600
if [[ -z $only || $only == imbalance/1600 ]]; then
    for variant in "ghm_c --grid class_loss.max_weight=null --grid class_loss.prior_count=1000:4.53" ce:1.13; do
        python scripts/ablate.py --config configs/demo/base.yaml --seeds "$seeds" --jobs "$jobs" \
            --output runs/prior_weights --results results/prior_count/weights_1600 --variants ${variant%:*} \
            --set "class_loss.weight=${variant##*:}" box_loss.weight=0.0316 \
            "data.train.annotations=$data/train.json" "data.train.images=$data/train" \
            "data.val.annotations=$data/val.json" "data.val.images=$data/val" data.short_side=128 data.long_side=160 \
            solver.epochs=2 evaluation.every=2 tensorboard.images=0 precision=bfloat16
    done
fi
[ -z "$only" ] || exit 0 # a picture needs all conditions
python scripts/compare_conditions.py results/imbalance --condition "negative anchors for each positive one" --log \
    --output docs/imbalance.png
python scripts/compare_conditions.py results/prior_count/imbalance --log --baseline "ghm_c[max_weight=30]" \
    --condition "negative anchors for each positive one" --output docs/prior_count.png
python scripts/compare_conditions.py results/few_digits --condition "negative anchors for each positive one" --log \
    --output runs/few_digits.png
