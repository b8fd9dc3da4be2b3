#!/bin/bash
# Pretrained BCCD and playing cards as in tables.sh, but with tuning runs of 165 and 448 steps instead of as many epochs
# as whole ones. On playing cards these end before the model tells the cards apart: the weights that they choose cost up
# to 19 AP (docs/results.md). Also forms of GHM-C on BCCD. Stop it at any time; the same command continues. Argument:
# runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
common=(data.workers=0 tensorboard.images=2)
laptop=(python scripts/ablate.py --config configs/laptop/base.yaml --jobs "${1:-1}" --set "${common[@]}")
bccd=("${laptop[@]}" --seeds 5 --output runs/laptop_short
    --tune 8 --tune-set solver.epochs=3 solver.warmup_steps=50 evaluation.every=3)
"${bccd[@]}" --results results/laptop_short \
    --variants ce focal ghm_c ghm_c_limited focal+giou ghm_c_limited+ghm_r qfl rank_sort
for form in momentum=0 prior_count=1000,6000; do
    "${bccd[@]}" --results results/forms/bccd --variants ghm_c --grid "class_loss.$form"
done

cards=()
for part in train val; do
    cards+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
"${laptop[@]}" "${cards[@]}" data.horizontal_flip=0 solver.epochs=20 evaluation.every=5 \
    --seeds 3 --results results/cards_short --output runs/cards_short --variants ce focal ghm_c ghm_c_limited \
    --tune 8 --tune-set solver.epochs=8 evaluation.every=8
python scripts/compare.py results/laptop_short/{ce,ghm_c,ghm_c_limited}-s*.json results/forms/bccd/*.json \
    --baseline ghm_c
python scripts/compare.py results/cards_short/*.json --baseline ce
