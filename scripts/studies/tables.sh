#!/bin/bash
# Tuned losses on BCCD and on playing cards with MobileNetV2 from ImageNet weights, and on BCCD with ResNet-18 from
# scratch, at 240 px. datasets/bccd and datasets/playing_cards hold train.json, val.json and images/. Stop it at any
# time; the same command continues. Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1}
four=(ce focal ghm_c ghm_c_limited)
common=(data.workers=0 tensorboard.images=2)
laptop=(python scripts/ablate.py --config configs/laptop/base.yaml --jobs "$jobs" --set "${common[@]}")
# Runs that tune have as many epochs as whole ones; short_tuning.sh says why.
"${laptop[@]}" --seeds 5 --results results/laptop --output runs/laptop \
    --variants "${four[@]}" focal+giou ghm_c_limited+ghm_r qfl rank_sort --tune 8 --tune-set evaluation.every=6

cards=()
for part in train val; do
    cards+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
"${laptop[@]}" "${cards[@]}" data.horizontal_flip=0 solver.epochs=20 evaluation.every=5 \
    --seeds 3 --results results/cards --output runs/cards --variants "${four[@]}" --tune 8 --tune-set evaluation.every=20

python scripts/ablate.py --config configs/bccd/base.yaml --seeds 3 --jobs "$jobs" --results results/scratch \
    --output runs/scratch --variants "${four[@]}" \
    --set "${common[@]}" data.short_side=240 data.long_side=336 solver.epochs=8 evaluation.every=2 \
    --tune 8 --tune-set evaluation.every=8
python scripts/compare.py results/laptop/*.json results/cards/*.json --baseline ce
python scripts/compare.py results/scratch/*.json --baseline ce
