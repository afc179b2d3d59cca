#!/usr/bin/env bash
# What int8 costs before and after edgekd mends it: short trainings of nine networks on two data sets, then the table.
# Interrupted work is resumed. About two hours on two quiet cores, with one thread.
#
#   benchmarks/int8.sh KATHER SIPAKMED WEIGHTS OUT
#
# KATHER, SIPAKMED: folders of class folders. WEIGHTS: folder of ImageNet weights, NAME.safetensors; a network that is
# not there starts from random weights. OUT: run folders; then `python benchmarks/int8.py OUT …` writes the table.
set -euo pipefail
weights=$3 out=$4
mkdir -p "$out"
declare -A folder=([kather]=$1 [sipakmed]=$2)
networks=(mobilenet_v2 tf_mobilenetv3_small_100 resnet18 squeezenet1_1 multi-exit-mobilenet_v2 shufflenet_v2_x1_0
    ghostnet_100 efficientnet_b0 mixnet_s)

for network in "${networks[@]}"; do
    for set in kather sipakmed; do
        start=none epochs=12 lr=0.05
        file=$weights/${network#multi-exit-}.safetensors
        if [ -f "$file" ]; then start=$file epochs=5 lr=0.02; fi
        # few pixels, few epochs; most images are left for the gate
        edgekd train --data "${folder[$set]}" --model "$network" --weights "$start" --epochs $epochs --lr $lr \
            --image-size 64 --batch-size 32 --split ratio:7,1,10 --workers 0 --precision 32-true \
            --out "$out/$network-$set" --resume
    done
done
