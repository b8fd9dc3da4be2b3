#!/bin/bash
# What the limit does where positives are rare: GHM-C with a limit of 1,000, on scenes of imbalance.sh and after it. All
# else, the class and box weight too, is as in its runs with a limit of 30. Each line: negative anchors for each
# positive one, scene, class weight, box weight. Stop it at any time; the same command continues. Arguments: runs at
# once (1), and the only ratio to train for (all).
set -euo pipefail
cd "$(dirname "$0")/../.."
while read -r ratio width height class box; do
    [[ $ratio == "${2:-$ratio}" ]] || continue
    data=datasets/imbalance/$ratio
    python scripts/ablate.py --config configs/demo/base.yaml --variants ghm_c --grid class_loss.max_weight=1000 \
        --seeds 3 --jobs "${1:-1}" --output "runs/limit/$ratio" --results "results/limit/$ratio" \
        --set "class_loss.weight=$class" "box_loss.weight=$box" \
        "data.train.annotations=$data/train.json" "data.train.images=$data/train" \
        "data.val.annotations=$data/val.json" "data.val.images=$data/val" "data.short_side=$height" \
        "data.long_side=$width" solver.epochs=2 evaluation.every=2 tensorboard.images=0 precision=bfloat16 </dev/null
done <<END
350 160 128 0.4 0.0316
1600 160 128 3.47 0.0421
46000 448 320 3.1 0.0431
END
[ -z "${2:-}" ] || exit 0 # a picture needs all ratios
python scripts/compare_conditions.py results/limit --condition "negative anchors for each positive one" --log \
    --baseline "ghm_c[max_weight=30]" --output docs/limit.png
