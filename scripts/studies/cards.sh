#!/bin/bash
# Playing cards beyond tables.sh, whose tuning runs end before the model tells the cards apart. First the limited GHM-C
# with larger class weights than they chose, one seed each. Then all four losses with tuning runs as long as whole ones.
# datasets/playing_cards holds train.json, val.json and images/. Stop it at any time; the same command continues.
# Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
settings=(data.workers=0 tensorboard.images=2 data.horizontal_flip=0 solver.epochs=20 evaluation.every=5)
for part in train val; do
    settings+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
study() { # NAME OPTIONS...
    python scripts/ablate.py --config configs/laptop/base.yaml --jobs "$jobs" --results "results/$1" --output "runs/$1" \
        --set "${settings[@]}" "${@:2}"
}
jobs=${1:-1}
study cards_weights --seeds 1 --variants ghm_c_limited --grid class_loss.weight=4,16 --grid box_loss.weight=1
study cards_long --seeds 3 --variants ce focal ghm_c ghm_c_limited --tune 8 --tune-set evaluation.every=20
python scripts/compare.py results/cards_weights/*.json
python scripts/compare.py results/cards_long/*.json --baseline ce --pairs
