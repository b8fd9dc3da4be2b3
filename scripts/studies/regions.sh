#!/bin/bash
# How many cells GHM-C's regions hold as a training goes on: short trainings of several lengths, each with its schedule.
# In batches of up to 64 images, and of the last training up to 1,024. Also of BCCD, if short_tuning.sh has trained it.
# Tables and figures go into results/regions.
# Arguments: the config (configs/demo_long/ghm_c.yaml), the numbers of steps, further KEY=VALUE.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=${1:-configs/demo_long/ghm_c.yaml} steps=${2:-30 100 300 564}
name=$(basename "$(dirname "$config")")
[ $# -gt 0 ] || python -m data.demo --output datasets/demo

for step in $steps; do
    python train.py --config "$config" --resume --set "${@:3}" run="regions/$step/$name" \
        "solver.max_steps=$step" tensorboard.images=0 evaluation.every=1000
done
python scripts/batch_regions.py --checkpoints $(for step in $steps; do echo "runs/regions/$step/$name/last.pt"; done) \
    --output "results/regions/$name"
large=(--images 2048 --batches 4 64 256 1024)
python scripts/batch_regions.py --checkpoints "runs/regions/${steps##* }/$name/last.pt" "${large[@]}" \
    --output "results/regions/${name}_large"
if [ -f runs/laptop_short/ghm_c-s0/best.pt ]; then
    python scripts/batch_regions.py --checkpoints runs/laptop_short/ghm_c-s0/best.pt --output results/regions/bccd
    python scripts/batch_regions.py --checkpoints runs/laptop_short/ghm_c-s0/best.pt "${large[@]}" \
        --output results/regions/bccd_large
fi
