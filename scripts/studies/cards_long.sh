#!/bin/bash
# The playing cards of tables.sh again, with tuning runs as long as whole ones: shorter ones end before the model tells
# the cards apart, and choose weights that only find them. Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
cards=()
for part in train val; do
    cards+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done
python scripts/ablate.py --config configs/laptop/base.yaml --seeds 3 --jobs "${1:-1}" --results results/cards_long \
    --output runs/cards_long --variants ce focal ghm_c ghm_c_limited \
    --set data.workers=0 tensorboard.images=2 "${cards[@]}" data.horizontal_flip=0 solver.epochs=20 evaluation.every=5 \
    --tune 8 --tune-set evaluation.every=20
python scripts/compare.py results/cards_long/*.json --baseline ce --pairs
