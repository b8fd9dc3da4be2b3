#!/bin/bash
# BCCD with a pretrained backbone as in tables.sh, but the runs that tune have as many epochs as whole runs. Stop it at
# any time; the same command continues. Argument: runs at once (1).
set -euo pipefail
cd "$(dirname "$0")/../.."
python scripts/ablate.py --config configs/laptop/base.yaml --jobs "${1:-1}" --set data.workers=0 tensorboard.images=2 \
    --seeds 5 --variants ce focal ghm_c ghm_c_limited focal+giou ghm_c_limited+ghm_r qfl rank_sort \
    --results results/laptop_long --output runs/laptop_long --tune 8 --tune-set evaluation.every=6
