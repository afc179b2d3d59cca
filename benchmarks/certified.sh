#!/usr/bin/env bash
# Early exits for networks that exist already, with a certificate: SIPaKMeD, Kather 2016 and an ImageNet network.
# About an hour on two quiet cores.
#
#   benchmarks/certified.sh SIPAKMED KATHER PICTURES WEIGHTS OUT
#
# SIPAKMED, KATHER: folders of class folders. PICTURES: pictures without labels. WEIGHTS: folder with
# resnet18.safetensors and resnet50.safetensors (ImageNet). OUT: a new folder; interrupted trainings are resumed.
set -euo pipefail
sipakmed=$1 kather=$2 pictures=$3 weights=$4 out=$5
mkdir -p "$out/results"

certify() { # NAME ENGINE DATA SPLIT PROMISE...
    local name=$1 engine=$2 data=$3 split=$4
    shift 4
    edgekd tune "$engine" --data "$data" --split "$split" --certainty 0.9 "$@"
    edgekd bench "$engine" --suite quick --data "$data" --split "$split" --out "$out/results/certified-$name.json"
}

# SIPaKMeD, all cells of one picture in one subset: exit heads on the frozen network, and a student trained jointly
plain=$out/sipakmed-plain
edgekd train --data "$sipakmed" --model resnet18 --weights "$weights/resnet18.safetensors" --epochs 8 --image-size 96 \
    --group cluster --split ratio:5,1,1,3 --out "$plain" --resume
edgekd distill --data "$sipakmed" --teacher "$plain" --weights "$plain" --student multi-exit-resnet18 --method kd+sd \
    --split "$plain/split.json" --image-size 96 --epochs 8 --set lr=0.01 --set ema=0.99 \
    --set 'augment.crop_scale=[0.7,1.0]' --out "$out/sipakmed-joint" --resume
edgekd add-exits "$plain" --out "$out/sipakmed-frozen.onnx"
edgekd export "$out/sipakmed-joint" --out "$out/sipakmed-joint.onnx"
for kind in frozen joint; do
    edgekd compile "$out/sipakmed-$kind.onnx" --recipe int8 --data "$sipakmed" --split "$plain/split.json" \
        --out "$out/sipakmed-$kind.engine"
    certify "sipakmed-$kind" "$out/sipakmed-$kind.engine" "$sipakmed" "$plain/split.json" --max-drop 2
done
