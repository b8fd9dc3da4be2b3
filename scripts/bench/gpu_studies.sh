#!/usr/bin/env bash
# The studies of batches, imbalance and wrong labels on one GPU, all conditions at once. The last two also
# tune: call it again until all are finished.
#
#     bash scripts/bench/gpu_studies.sh [LOGS] [SECONDS]
#
# Results go into results/, a log of each condition into LOGS (runs/logs). After SECONDS (540) it stops what still
# trains; the same command continues. The commands of scripts/studies then draw the pictures.
set -u
cd "$(dirname "$0")/../.."
logs=${1:-runs/logs} limit=${2:-540}
mkdir -p "$logs"
export NO_ALBUMENTATIONS_UPDATE=1 OMP_NUM_THREADS=1
export PYTHON_CPU_COUNT=2 # for data.workers: 12 conditions share the cores, with two runs each
python -m data.demo --quick --output datasets/batches --train-images 750 --val-images 150 || exit # three conditions share it

study() { # NAME CONDITIONS...
    local name=$1
    shift
    for condition in "$@"; do
        # With the trap, bash, and so timeout and wait, wait until ablate.py has saved.
        timeout "$limit" bash -c 'trap "exit 143" TERM; . "$0" "$@"' "scripts/studies/$name.sh" 2 "" "$condition" \
            > "$logs/$name-${condition//\//-}.log" 2>&1 &
    done
}
study batches 4 16 64
study imbalance imbalance/{70,350,1600,11000,46000} few_digits/70
study wrong_labels 0 20 40
wait
tail -n 1 "$logs"/*.log
