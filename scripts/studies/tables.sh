#!/bin/bash
# Tuned losses and forms of GHM-C on BCCD with MobileNetV2 from ImageNet weights, losses on playing cards with the same,
# and on BCCD with ResNet-18 from scratch, at 240 px. datasets/bccd and datasets/playing_cards hold train.json, val.json
# and images/. Stop it at any time; the same command continues. Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1}
four=(ce focal ghm_c ghm_c_limited)
common=(data.workers=0 tensorboard.images=2)
short=(--tune 8 --tune-set solver.epochs=3 solver.warmup_steps=50 evaluation.every=3)

laptop=(python scripts/ablate.py --config configs/laptop/base.yaml --jobs "$jobs" --set "${common[@]}")
"${laptop[@]}" --seeds 5 --results results/laptop "${short[@]}" \
    --variants "${four[@]}" focal+giou ghm_c_limited+ghm_r qfl rank_sort
for form in momentum=0 prior_count=1000,6000; do
    "${laptop[@]}" --seeds 5 --results results/forms/bccd "${short[@]}" --variants ghm_c --grid "class_loss.$form"
done

cards=()
for part in train val; do
    cards+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
"${laptop[@]}" "${cards[@]}" data.horizontal_flip=0 solver.epochs=20 evaluation.every=5 \
    --seeds 3 --results results/cards --output runs/cards --variants "${four[@]}" \
    --tune 8 --tune-set evaluation.every=20 # as many epochs as whole runs; short_tuning.sh says why

python scripts/ablate.py --config configs/bccd/base.yaml --seeds 3 --jobs "$jobs" --results results/scratch \
    --output runs/scratch --variants "${four[@]}" \
    --set "${common[@]}" data.short_side=240 data.long_side=336 solver.epochs=8 evaluation.every=2 "${short[@]}"
python scripts/compare.py results/laptop/{ce,ghm_c,ghm_c_limited}-s*.json results/forms/bccd/*.json --baseline ghm_c
python scripts/compare.py results/laptop/*.json results/cards/*.json --baseline ce
python scripts/compare.py results/scratch/*.json --baseline ce
