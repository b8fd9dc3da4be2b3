#!/bin/bash
# Focal, GHM-C and GHM-C with a limit in batches of 4, 16 and 64 images, and forms and weights of GHM-C in batches of 4.
# Each run sees 9,000 images, in parts of 4, so that BatchNorm sees the same; lr grows with the square root of the batch
# size, as is usual for AdamW. GHM-C counts the whole batch, however it is split. Stop it at any time; the same command
# continues. Arguments: runs at once (1), seeds (3), and the only batch to train with (all).
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${1:-1} seeds=${2:-3} only=${3:-}

python -m data.demo --quick --output datasets/batches --train-images 750 --val-images 150
data=()
for part in train val; do
    data+=("data.$part.annotations=datasets/batches/$part.json" "data.$part.images=datasets/batches/$part")
done
while read -r batch parts lr warmup; do
    [[ $batch == "${only:-$batch}" ]] || continue
    train=(python scripts/ablate.py --config configs/demo/base.yaml --seeds "$seeds" --jobs "$jobs"
        --output "runs/batches/$batch" --set "${data[@]}" "solver.batch_size=$batch" "solver.accumulate=$parts" "solver.lr=$lr"
        "solver.warmup_steps=$warmup" solver.epochs=12 evaluation.every=12 tensorboard.images=0 precision=bfloat16)
    "${train[@]}" --results "results/batches/$batch" --variants focal </dev/null
    "${train[@]}" --results "results/batches/$batch" --variants ghm_c --grid class_loss.max_weight=null,30 </dev/null
    if [ "$batch" = 4 ]; then
        for form in momentum=0,0.99 weight=0.4,1.3 bins=10 prior_count=100,1000; do
            "${train[@]}" --results results/forms/demo --variants ghm_c --grid class_loss.max_weight=null \
                --grid "class_loss.$form" </dev/null
        done
    fi
done <<END
4 1 0.002 50
16 4 0.004 50
64 16 0.008 20
END
[ -z "$only" ] || exit 0 # a picture needs all conditions
python scripts/compare_conditions.py results/batches --condition "images a batch" --log --baseline focal \
    --output docs/batches.png
python scripts/compare.py results/batches/4/*.json results/forms/demo/*.json --baseline "ghm_c[max_weight=null]"
