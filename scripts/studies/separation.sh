#!/bin/bash
# How well trained models tell true classes from others and from background (scripts/gradients.py): a line in
# results/separation.txt for each run of batches.sh, imbalance.sh and short_tuning.sh that is in runs/ and has none yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
shopt -s nullglob
results=results/separation.txt
touch "$results"
for checkpoint in runs/batches/4/*-s?/best.pt runs/imbalance/*/*-s?/best.pt runs/laptop_short/ghm_c*-s?/best.pt; do
    run=$(dirname "$checkpoint")
    grep -qF "${run#runs/}: " "$results" && continue
    line=$(python scripts/gradients.py --checkpoint "$checkpoint" --images 400 --output "$run/gradients" | head -n 1)
    echo "${run#runs/}: $line" | tee -a "$results"
done
