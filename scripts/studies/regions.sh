#!/bin/bash
# How many cells GHM-C's regions hold as a training goes on: short trainings of several lengths, each with its schedule.
# Arguments: the config (configs/demo_long/ghm_c.yaml, without a limit), the numbers of steps, further KEY=VALUE.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=${1:-configs/demo_long/ghm_c.yaml} steps=${2:-30 100 300 564}
name=$(basename "$(dirname "$config")")
[ $# -gt 0 ] || python -m data.demo --out datasets/demo

for step in $steps; do
    python train.py --config "$config" --resume --set class_loss.max_weight=null "${@:3}" run="regions/$name/step$step" \
        "solver.max_steps=$step" tensorboard.images=0 evaluation.every=1000
done
python scripts/batch_regions.py --checkpoints $(for step in $steps; do echo "runs/regions/$name/step$step/last.pt"; done) \
    --output "runs/regions/$name"
