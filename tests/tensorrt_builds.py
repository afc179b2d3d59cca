"""Build every graph of every kind of network with NVIDIA's real builder, TensorRT-RTX, and write a table of it.

python tests/tensorrt_builds.py OUT.md [NETWORK …]

Needs a package registry, no GPU. Weights are random, images have 64 pixels; see helpers/real_builder.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
from helpers.real_builder import RECIPES, builds, exported, int8_nodes, quantised, wheels

from edgekd.backends.tensorrt.layers import precision_of_nodes, precisions
from edgekd.backends.tensorrt.library import TENSORRT_RTX
from edgekd.bench.tables import pipe_table
from edgekd.errors import EdgekdError

NETWORKS = (
    "msdnet",
    "scan-resnet18",
    "multi-exit-resnet18",
    "multi-exit-resnet50",
    "multi-exit-convnext_atto",
    "multi-exit-densenet121",
    "multi-exit-efficientnet_b0",
    "multi-exit-ghostnet_100",
    "multi-exit-mixnet_s",
    "multi-exit-mobilenet_v2",
    "multi-exit-mobilenetv3_small_100",
    "multi-exit-shufflenet_v2_x1_0",
    "multi-exit-squeezenet1_1",
)
SIZE = 64
COLUMNS = ["network", "recipe", "graphs built", "quantised convolutions that read int8", "layers by precision"]


def row(path: Path, recipe: str) -> list[str]:
    """What the builder makes of a network."""
    try:
        plans = builds(quantised(path, RECIPES[recipe]), RECIPES[recipe])
    except EdgekdError as error:
        return [path.stem, recipe, error.what.replace("\n", " "), "", ""]
    wanted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for plan in plans.values():
        nodes = int8_nodes(plan.graph)
        wanted["int8"] += len(nodes)
        found.update(str(p) for p in precision_of_nodes(plan.layers, nodes).values())
    told = Counter(str(p) for plan in plans.values() for p in precisions(plan.layers))
    int8 = f"{found['int8']} of {wanted['int8']}" if wanted["int8"] else ""
    by_precision = ", ".join(f"{count} {name}" for name, count in told.most_common())
    return [path.stem, recipe, f"{len(plans)} of {len(plans)}", int8, by_precision]


def main(out: str, *names: str) -> int:
    sys.path.insert(0, str(wheels()))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or NETWORKS:
            path = exported(name, Path(folder), size=SIZE)
            for recipe in RECIPES:
                rows.append(row(path, recipe))
                print(*rows[-1], sep=" | ", flush=True)
    failed = [r for r in rows if not r[2][:1].isdigit() or len(set(r[3].split(" of "))) > 1]
    header = f"""# Engines that TensorRT-RTX builds

Written by `make test-tensorrt`: {TENSORRT_RTX.name} {TENSORRT_RTX.version()}, for GPUs of SM 8.6, built where there is
no GPU, so not run. Networks have random weights and {SIZE} pixels. Every stage, the whole and the last exit alone are
built, with exit heads in int8; for batch size 1 and, as int8-fp16, 8, too. Layers are those that multiply by weights,
over all graphs and batch sizes (onnx {onnx.__version__}).

"""
    Path(out).write_text(header + pipe_table((COLUMNS, rows)) + "\n", encoding="utf-8")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
