#!/usr/bin/env bash
# Early exits for networks that exist already, with a certificate: SIPaKMeD, Kather 2016 and an ImageNet network.
# About an hour on two quiet cores.
#
#   benchmarks/certified.sh SIPAKMED KATHER WEIGHTS IMAGENET PICTURES OUT
#
# SIPAKMED, KATHER: folders of class folders. WEIGHTS: folder with resnet18.safetensors (ImageNet). IMAGENET: an ONNX
# classifier. PICTURES: pictures without labels. OUT: a new folder; interrupted trainings are resumed. OUT/results then
# contains the files of benchmarks/results/certified.
set -euo pipefail
sipakmed=$1 kather=$2 weights=$3 imagenet=$4 pictures=$5 out=$6
mkdir -p "$out/results"

certify() { # NAME ENGINE DATA SPLIT PLAIN PROMISE...
    local name=$1 engine=$2 data=$3 split=$4 plain=$5
    shift 5
    edgekd tune "$engine" --data "$data" --split "$split" --certainty 0.9 "$@"
    edgekd bench "$engine" --suite quick --data "$data" --split "$split" --against plain="$plain" \
        --out "$out/results/$name.json"
}

# SIPaKMeD, all cells of one picture in one subset: exit heads on the frozen network, and a student trained jointly
plain=$out/sipakmed-plain
edgekd train --data "$sipakmed" --model resnet18 --weights "$weights/resnet18.safetensors" --epochs 8 --image-size 96 \
    --group cluster --split ratio:5,1,1,3 --out "$plain" --resume
edgekd distill --data "$sipakmed" --teacher "$plain" --weights "$plain" --student multi-exit-resnet18 --method kd+sd \
    --split "$plain/split.json" --image-size 96 --epochs 8 --set lr=0.01 --set ema=0.99 \
    --set 'augment.crop_scale=[0.7,1.0]' --out "$out/sipakmed-joint" --resume
edgekd add-exits "$plain" --out "$out/sipakmed-frozen.onnx"
edgekd export "$plain" --out "$out/sipakmed-plain.onnx"
edgekd export "$out/sipakmed-joint" --out "$out/sipakmed-joint.onnx"
for kind in frozen joint; do
    edgekd compile "$out/sipakmed-$kind.onnx" --recipe int8 --data "$sipakmed" --split "$plain/split.json" \
        --out "$out/sipakmed-$kind.engine"
    certify "sipakmed-$kind" "$out/sipakmed-$kind.engine" "$sipakmed" "$plain/split.json" \
        "$out/sipakmed-plain.onnx" --max-change 2
done

# Kather 2016 has ten slides, too few to certify by slide: its promise is about tiles of the same slides
kather_plain=$out/kather-plain
edgekd train --data "$kather" --model resnet18 --weights "$weights/resnet18.safetensors" --epochs 8 --image-size 72 \
    --split ratio:3,1,1,1 --out "$kather_plain" --resume
edgekd add-exits "$kather_plain" --out "$out/kather-frozen.onnx"
edgekd compile "$out/kather-frozen.onnx" --recipe int8 --data "$kather" --split "$kather_plain/split.json" \
    --out "$out/kather-frozen.engine"
edgekd export "$kather_plain" --out "$out/kather-plain.onnx"
certify kather-frozen "$out/kather-frozen.engine" "$kather" "$kather_plain/split.json" "$out/kather-plain.onnx" \
    --max-change 1 --group none

python "$(dirname "$0")/certified.py" "$out/results/certified.md" \
    "SIPaKMeD, exits on the frozen network=$out/results/sipakmed-frozen.json" \
    "SIPaKMeD, student trained jointly=$out/results/sipakmed-joint.json" \
    "Kather 2016, exits on the frozen network=$out/results/kather-frozen.json"

# An ImageNet network from torchvision, as an ONNX file, on pictures of another kind, without labels
edgekd add-exits "$imagenet" --data "$pictures" --preprocess imagenet --views 1 --heads-share 0.4 --exclude-bad \
    --out "$out/imagenet.onnx" || echo "no early exit pays"
