#!/bin/bash
# The limited GHM-C on the playing cards, with larger class weights than the one that tuning chose. One seed each.
# datasets/playing_cards holds train.json, val.json and images/. Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
settings=()
for part in train val; do
    settings+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
python scripts/ablate.py --config configs/laptop/base.yaml --seeds 1 --jobs "${1:-1}" --results results/cards_weights \
    --output runs/cards_weights --variants ghm_c_limited --grid class_loss.weight=4,16 --grid box_loss.weight=1 \
    --set "${settings[@]}" data.workers=0 tensorboard.images=2 data.horizontal_flip=0 solver.epochs=20 evaluation.every=5
python scripts/compare.py results/cards_weights/*.json
