#!/usr/bin/env bash
# All that is worth measuring on a GPU, in at most eight minutes: the tests that need one, each benchmark beside its
# peer, and a real training. Writes gpu.md, a section for docs/benchmarks.md, into the folder given (default: .).
#
#     bash scripts/bench/gpu.sh [FOLDER] [DATA]
#
# DATA holds train.json, val.json and images/ for the real training (default: scenes of the demo). Each part has a time
# limit and may fail without stopping the others. The last parts get the seconds that are left of LIMIT (480). QUICK=1
# tries the script itself on a CPU.
set -u
mkdir -p "${1:-.}" || exit
out=$(realpath "${1:-.}") data=${2:+$(realpath "$2")}
page=$out/gpu.md
python=${PYTHON:-python}
cd "$(dirname "$0")/../.."
export NO_ALBUMENTATIONS_UPDATE=1

part() { # TITLE SECONDS COMMAND...
    local title=$1 seconds=$2 start=$SECONDS word words=
    shift 2
    for word; do
        [[ $word == *' '* ]] && words+=" \"$word\"" || words+=" $word"
    done
    local left=$((${LIMIT:-480} - start))
    printf '\n### %s\n\n   %s\n\n' "$title" "$words" | tee -a "$page"
    if ((left < 1)); then
        echo "no time left" | tee -a "$page"
        return
    fi
    timeout "$((left < seconds ? left : seconds))" "$@" 2> "$out/stderr.txt" | tee -a "$page"
    local code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then
        printf '\nexit code %s: %s\n' "$code" "$(tail -n 1 "$out/stderr.txt")" | tee -a "$page"
    fi
    echo "[$title: $((SECONDS - start)) s]" >&2
}

if [ -n "${QUICK:-}" ]; then
    cells=2000 type=float32 step=resnet18:64:2 small=resnet18:64:2 sides=128 inference=resnet18:64:2 short=64
else
    cells=3225600 type=bfloat16 step=resnet50:1024:16 small=resnet50:1024:2 sides=1024 inference=resnet50:800:8 short=800
fi

printf '## On a GPU\n\n%s, %s\n' "$(date -u +%Y-%m-%d)" \
    "$($python -c 'from scripts.bench import measure; print(measure.environment())')" > "$page"
part "Tests that need a GPU" 90 $python -m pytest -q -n 4 -p no:cacheprovider -k "cuda or gpu or graphs or conv or triton" \
    tests/detector/test_graphs.py tests/detector/test_conv.py tests/detector/test_transfer.py \
    tests/detector/losses/test_laws.py tests/detector/losses/test_fused.py
part "Training step, batch 16" 100 $python scripts/bench/step.py --work $step --repeats 5
part "Training step, batch 2" 60 $python scripts/bench/step.py --work $small --repeats 5
part "Training step, batch 16, losses" 60 $python scripts/bench/step.py --work $step --repeats 9 --ours \
    --also "class_loss.name=ce" "class_loss.name=ghm_c box_loss.name=ghm_r" "class_loss.name=ohem" \
    "box_loss.name=giou" "box_loss.name=giou assigner.name=atss"
part "Class losses" 60 $python scripts/bench/losses.py --rows $cells --dtype $type --repeats 5
if [ -z "$data" ] && data=$out/demo && [ ! -d "$data" ]; then
    $python -m data.demo --output "$data" --train-images 500 --val-images 40 > /dev/null
    mkdir -p "$data/images" && mv "$data"/train/* "$data"/val/* "$data/images"
fi
part "A real training" 110 $python scripts/bench/real_training.py "$data" --output "$out/runs" --short-side $short
of_data=()
for set in train val; do
    of_data+=("data.$set.annotations=$data/$set.json" "data.$set.images=$data/images")
done
part "Start" 60 $python scripts/bench/start.py --config configs/coco/focal.yaml --repeats 1 --set data.short_side=$short \
    "model.weights=$out/runs/resnet50.pth" "${of_data[@]}"
part "Inference" 50 $python scripts/bench/inference.py --work $inference --repeats 5
part "Assignment" 30 $python scripts/bench/assigner.py --images ${step##*:} --sides $sides --boxes 1 10 100 --repeats 5
echo "written: $page" >&2
