#!/bin/bash
# Playing cards as in tables.sh, but with tuning runs of 448 steps, which end before the model tells the cards apart: the
# weights that they choose cost up to 19 AP (docs/results.md). Stop it at any time; the same command continues.
# Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
cards=()
for part in train val; do
    cards+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
python scripts/ablate.py --config configs/laptop/base.yaml --seeds 3 --jobs "${1:-1}" --results results/cards_short \
    --output runs/cards_short --variants ce focal ghm_c ghm_c_limited \
    --set data.workers=0 tensorboard.images=2 "${cards[@]}" data.horizontal_flip=0 solver.epochs=20 evaluation.every=5 \
    --tune 8 --tune-set solver.epochs=8 evaluation.every=8
python scripts/compare.py results/cards_short/*.json --baseline ce
