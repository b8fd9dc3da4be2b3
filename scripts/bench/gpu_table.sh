#!/usr/bin/env bash
# The tables of scripts/studies/tables.sh on one GPU, with more pixels and epochs than a CPU can afford: eight trainings
# at once.
#
#     bash scripts/bench/gpu_table.sh DATA OUTPUT [WEIGHTS]
#
# DATA holds bccd/ and playing_cards/, each with train.json, val.json and images/. WEIGHTS is a file with torchvision's
# weights of MobileNetV2, for a machine without a network. Small files with the results go into OUTPUT/results. After
# SECONDS_LEFT (540) it stops; the same command continues, also on another machine that has OUTPUT/results and the same
# path of WEIGHTS. QUICK=1 tries the script itself on a CPU.
set -u
data=$(realpath "$1") weights=${3:-imagenet}
mkdir -p "$2" && output=$(realpath "$2")
[ -f "$weights" ] && weights=$(realpath "$weights")
cd "$(dirname "$0")/../.."
export NO_ALBUMENTATIONS_UPDATE=1 OMP_NUM_THREADS=1
until=$((SECONDS + ${SECONDS_LEFT:-540}))

study() { # NAME SET CONFIG SEEDS TRIALS "VARIANTS" "SETTINGS" "SETTINGS OF TUNING RUNS"
    local left=$((until - SECONDS)) files=()
    [ "$left" -gt 0 ] || return
    for part in train val; do
        files+=("data.$part.annotations=$data/$2/$part.json" "data.$part.images=$data/$2/images")
    done
    # shellcheck disable=SC2086  # lists of words
    timeout "$left" ${PYTHON:-python} scripts/ablate.py --config "configs/$3/base.yaml" --variants $6 --seeds "$4" \
        --tune "$5" --tune-set $8 --jobs "${JOBS:-8}" --output "$output/runs/$1" --results "$output/results/$1" \
        --set "${files[@]}" data.workers=1 data.cache="$output/cache" tensorboard.images=0 $7
    echo "[$1: exit code $?, $((until - SECONDS)) s left]"
}

four="ce focal ghm_c ghm_c_limited"
eight="$four focal+giou ghm_c_limited+ghm_r qfl rank_sort"
if [ -n "${QUICK:-}" ]; then
    small="solver.max_steps=2 solver.warmup_steps=1 data.short_side=64 data.long_side=64"
    study laptop bccd laptop 2 2 "ce focal" "$small model.weights=$weights" "solver.max_steps=1"
    exit
fi
wide="data.short_side=480 data.long_side=672"
study laptop bccd laptop 5 8 "$eight" "$wide model.weights=$weights solver.epochs=12" "evaluation.every=12"
forms="ghm_c --grid class_loss."
for form in momentum=0 prior_count=1000,6000; do
    study forms/bccd bccd laptop 5 8 "$forms$form" "$wide model.weights=$weights solver.epochs=12" "evaluation.every=12"
done
study cards playing_cards laptop 3 8 "$four" \
    "$wide model.weights=$weights data.horizontal_flip=0 solver.epochs=30 evaluation.every=10" \
    "evaluation.every=30" # shorter ones end before the model tells the cards apart
study scratch bccd bccd 3 8 "$four" "$wide solver.epochs=16" "evaluation.every=16"
