#!/usr/bin/env bash
# All that is worth measuring on a GPU, in eight minutes: the tests that need one, each benchmark beside its peer, and a
# real training. Writes gpu.md, a section for docs/benchmarks.md, into the folder given (default: .).
#
#     bash scripts/bench/gpu.sh [FOLDER]
#
# Each part has a time limit and may fail without stopping the others. QUICK=1 tries the script itself on a CPU.
set -u
out=${1:-.}
mkdir -p "$out"
page=$out/gpu.md
python=${PYTHON:-python}
cd "$(dirname "$0")/../.." && out=$(realpath "$out")
export NO_ALBUMENTATIONS_UPDATE=1

part() { # TITLE SECONDS COMMAND...
    local title=$1 seconds=$2 start=$SECONDS
    shift 2
    printf '\n### %s\n\n    %s\n\n' "$title" "$*" | tee -a "$page"
    timeout "$seconds" "$@" 2> "$out/stderr.txt" | tee -a "$page"
    local code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then
        printf '\nexit code %s: %s\n' "$code" "$(tail -n 1 "$out/stderr.txt")" | tee -a "$page"
    fi
    echo "[$title: $((SECONDS - start)) s]" >&2
}

if [ -n "${QUICK:-}" ]; then
    cells=2000 type=float32 step=resnet18:64:2 small=resnet18:64:2 sides=128 inference=resnet18:64:2 epochs=1 scenes=16
else
    cells=3225600 type=bfloat16 step=resnet50:1024:16 small=resnet50:1024:2 sides=1024 inference=resnet50:800:8 epochs=8 scenes=750
fi

printf '## On a GPU\n\n%s, %s\n' "$(date -u +%Y-%m-%d)" \
    "$($python -c 'from scripts.bench import measure; print(measure.environment())')" > "$page"
part "Tests that need a GPU" 90 $python -m pytest -q -k "cuda or gpu or triton" \
    tests/detector/losses tests/detector/test_criterion.py
part "Class losses" 90 $python scripts/bench/losses.py --rows $cells --dtype $type --repeats 5
part "Training step, batch 16" 100 $python scripts/bench/step.py --work $step --repeats 5
part "Training step, batch 2" 60 $python scripts/bench/step.py --work $small --repeats 5
part "Assignment" 30 $python scripts/bench/assigner.py --sides $sides --repeats 5
part "Inference" 60 $python scripts/bench/inference.py --work $inference --repeats 5
part "A real training" 90 bash -c "$python -m data.demo --out $out/demo --train-images $scenes --val-images 50 > /dev/null && $python train.py \
    --config configs/demo/ghm.yaml --set output=$out/runs solver.epochs=$epochs data.workers=0 \
    data.train.annotations=$out/demo/train.json data.train.images=$out/demo/train \
    data.val.annotations=$out/demo/val.json data.val.images=$out/demo/val | tail -n 14"
echo "written: $page" >&2
