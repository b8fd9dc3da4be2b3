#!/bin/bash
# Tuned losses on BCCD and on playing cards with MobileNetV2 from ImageNet weights, and on BCCD with ResNet-18 from
# scratch, at 240 px; then GHM-C with a prior count on each, and playing cards for three times as many epochs.
# datasets/bccd and datasets/playing_cards hold train.json, val.json and images/. Stop it at any time; the same command
# continues. Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1}
four=(ce focal ghm_c ghm_c_limited)
common=(data.workers=0 tensorboard.images=2)
laptop=(python scripts/ablate.py --config configs/laptop/base.yaml --jobs "$jobs" --set "${common[@]}")
photos=()
for part in train val; do
    photos+=("data.$part.annotations=datasets/playing_cards/$part.json" "data.$part.images=datasets/playing_cards/images")
done

# Runs that tune have as many epochs as whole ones; short_tuning.sh says why.
pretrained=("${laptop[@]}" --seeds 5 --output runs/laptop --tune 8 --tune-set evaluation.every=6)
of_cards=("${laptop[@]}" "${photos[@]}" data.horizontal_flip=0 solver.epochs=20 evaluation.every=5)
cards=("${of_cards[@]}" --seeds 3 --output runs/cards --tune 8 --tune-set evaluation.every=20)
scratch=(python scripts/ablate.py --config configs/bccd/base.yaml --seeds 3 --jobs "$jobs" --output runs/scratch
    --set "${common[@]}" data.short_side=240 data.long_side=336 solver.epochs=8 evaluation.every=2
    --tune 8 --tune-set evaluation.every=8)
"${pretrained[@]}" --results results/laptop --variants "${four[@]}" focal+giou ghm_c_limited+ghm_r qfl rank_sort
"${cards[@]}" --results results/cards --variants "${four[@]}"
"${scratch[@]}" --results results/scratch --variants "${four[@]}"

prior=(--variants ghm_c --grid class_loss.prior_count=1000)
"${pretrained[@]}" --results results/prior_count/laptop "${prior[@]}"
"${cards[@]}" --results results/prior_count/cards "${prior[@]}"
"${scratch[@]}" --results results/prior_count/scratch "${prior[@]}"
# On playing cards, the weights that tuning chose for the prior count, with two other losses. CE's file has a weight of
# 1, GHM-C's 4.
for variant in ce:0.613 ghm_c_limited:2.45; do
    "${of_cards[@]}" class_loss.weight="${variant#*:}" box_loss.weight=0.01 --seeds 1 --variants "${variant%:*}" \
        --output runs/cards_weights --results results/cards_weights
done
# The same weights with a higher limit.
"${of_cards[@]}" class_loss.weight=2.45 box_loss.weight=0.01 --seeds 3 --variants ghm_c \
    --grid class_loss.max_weight=100 --output runs/cards_weights --results results/cards_weights
# Three times as many epochs on playing cards, with the weights tuned for 20 epochs: class weight, box weight, options.
while read -r variant class box options; do
    # shellcheck disable=SC2086  # no options are no argument
    "${of_cards[@]}" solver.epochs=60 class_loss.weight="$class" box_loss.weight="$box" --seeds 3 \
        --variants "$variant" $options --output runs/cards_long --results results/cards_long </dev/null
done <<'VARIANTS'
ghm_c 2.45 0.01 --grid class_loss.prior_count=1000
ce 1.26 2.61
focal 10 0.1
VARIANTS

python scripts/compare.py results/laptop/*.json results/cards/*.json --baseline ce
python scripts/compare.py results/scratch/*.json --baseline ce
