#!/usr/bin/env bash
# SIPaKMeD from images to tables, random and grouped split: about two and a half hours on two quiet cores.
#
#   benchmarks/sipakmed.sh DATA WEIGHTS OUT
#
# DATA: folder of the five class folders. WEIGHTS: folder with resnet18.safetensors and resnet50.safetensors (ImageNet).
# OUT: a new folder; interrupted runs are resumed. OUT/results then contains the files of benchmarks/results.
set -euo pipefail
data=$1 weights=$2 out=$3
mkdir -p "$out/results"

pair() { # NAME GROUP SEED
    local plain=$out/plain-$1 student=$out/student-$1
    edgekd train --data "$data" --model resnet18 --weights "$weights/resnet18.safetensors" --epochs 20 --group "$2" --seed "$3" \
        --out "$plain" --resume
    edgekd distill --data "$data" --teacher "$plain" --weights "$plain" --student multi-exit-resnet18 --method kd+sd \
        --split "$plain/split.json" --epochs 16 --seed "$3" --set lr=0.01 --set ema=0.99 --set 'augment.crop_scale=[0.7,1.0]' \
        --out "$student" --resume
    for run in plain student; do
        edgekd evaluate "$out/$run-$1" --json >"$out/results/$1-$run.json"
        cp "$out/$run-$1/metrics.csv" "$out/results/$1-$run.csv"
    done
}

one() { # NAME GROUP CALIBRATION_IMAGES
    local engine=$out/student-$1.engine split=$out/student-$1/split.json
    pair "$1" "$2" 0
    for run in plain student; do edgekd export "$out/$run-$1" --out "$out/$run-$1.onnx"; done
    edgekd compile "$out/student-$1.onnx" --recipe int8 --set "calibration_images=$3" --data "$data" --split "$split" --out "$engine"
    edgekd tune "$engine" --data "$data" --split "$split" --max-accuracy-drop 0.3
    edgekd bench "$engine" --suite full --set targets.faster.plain-resnet18=6 --set targets.accuracy_drop=0.5 \
        --set targets.staged=1.10 --set targets.overhead_ms=0.2 --data "$data" --split "$split" \
        --against plain-resnet18="$out/plain-$1.onnx" --out "$out/results/sipakmed-$1.json"
    python - "$out/results/sipakmed-$1" <<'PY'
import sys
from pathlib import Path
from edgekd.bench.plots import trade_off
from edgekd.bench.record import read_record
stem = sys.argv[1]
Path(f"{stem}.svg").write_text(trade_off(read_record(Path(f"{stem}.json"))))
PY
}

# ResNet50 for comparison: with so few epochs it is the weaker network, so it is not used as the teacher.
edgekd train --data "$data" --model resnet50 --weights "$weights/resnet50.safetensors" --epochs 12 --set lr=0.01 \
    --out "$out/resnet50-random" --resume
edgekd evaluate "$out/resnet50-random" --json >"$out/results/random-resnet50.json"
one random none 256
one grouped cluster 512

# The same training with other seeds, and so other splits: the random variation of the accuracies.
for seed in 1 2; do
    pair "random-$seed" none "$seed"
    pair "grouped-$seed" cluster "$seed"
done
