"""The folder that the fault tests work on: what a small run of the commands leaves.

python tests/faults/base.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMANDS = """
data synthetic --out cells --count 150 --size 40
train --data cells --model multi-exit-test_resnet --protocol demo --weights none --epochs 2 --image-size 32 \
--set workers=0 --set batch_size=16 --set precision=32-true --out run
export run --data cells --out student.onnx
compile student.onnx --backend onnxruntime --set batch_sizes=[1] --out student.engine
tune student.engine --data cells --split run/split.json --latency-ms 100 --keep-exits
bench student.engine --data cells --split run/split.json --suite tiny.toml --no-report --out record.json
"""
SUITE = """
batch_sizes = [1]
min_count = [20]
min_seconds = 0.05
warmup_seconds = 0.02
rounds = 2
pool = 20
"""


def make_base(folder: Path) -> None:
    """Write cells/, run/, student.onnx, student.engine/ (ONNX Runtime, tuned), record.json and tiny.toml."""
    folder.mkdir(parents=True)
    (folder / "tiny.toml").write_text(SUITE)
    for command in COMMANDS.strip().splitlines():
        done = subprocess.run(
            [sys.executable, "-m", "edgekd", *command.split()], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    make_base(Path(sys.argv[1]))
