"""A network of two exits with known answers, and pictures for it, made without a training framework.

The first exit looks at the red light of a picture, the last at the green one. Where red is dim or bright they agree;
where it is in between the first exit is not certain, and wrong about half the time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgekd.artifacts.metadata import Exit, ModelMetadata, put_metadata
from edgekd.artifacts.training_images import TrainingImages
from edgekd.data.preprocess import Preprocess
from edgekd.policy import Policy

SIZE, CLASSES = 16, ("bright", "dark")


def write_network(path: Path, *, training_images: TrainingImages | None = None) -> Path:
    """Write student.onnx."""
    weights = {"w0": [[8.0, 0, 0], [-8.0, 0, 0]], "w1": [[0, 8.0, 0], [0, -8.0, 0]]}
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["stage_0"], name="pool"),
        helper.make_node("Flatten", ["stage_0"], ["flat0"], name="flatten0"),
        helper.make_node("Gemm", ["flat0", "w0"], ["exit_0"], name="fc0", transB=1),
        helper.make_node("Relu", ["stage_0"], ["positive"], name="relu"),
        helper.make_node("Neg", ["stage_0"], ["minus"], name="neg"),
        helper.make_node("Relu", ["minus"], ["negative"], name="relu2"),
        helper.make_node("Sub", ["positive", "negative"], ["stage_1"], name="sub"),
        helper.make_node("Flatten", ["stage_1"], ["flat1"], name="flatten1"),
        helper.make_node("Gemm", ["flat1", "w1"], ["exit_1"], name="fc1", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "two-lights",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(f"exit_{k}", TensorProto.FLOAT, ["n", 2]) for k in range(2)],
        [numpy_helper.from_array(np.float32(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    exits = (Exit("exit_0", ("stage_0",)), Exit("exit_1", ("stage_1",)))
    preprocess = Preprocess(SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    metadata = ModelMetadata(
        "two-lights", CLASSES, preprocess, exits, Policy((1.0, 1.0)), training_images=training_images
    )
    put_metadata(model, metadata)
    onnx.save(model, str(path))
    return path


def write_pictures(folder: Path, count: int, *, hard: float = 0.2, seed: int = 0, group: int = 1) -> Path:
    """Write pictures into class folders, named NUMBER-GROUP.png.

    Args:
        folder: The folder.
        count: Number of pictures.
        hard: Share of them about which the first exit is not certain.
        seed: Random seed.
        group: Number of pictures of each group.
    """
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        is_bright, is_hard = rng.random() < 0.5, rng.random() < hard
        green = rng.uniform(150, 250) if is_bright else rng.uniform(5, 105)
        red = rng.uniform(115, 140) if is_hard else green
        pixels = np.empty((SIZE, SIZE, 3))
        pixels[:] = red, green, rng.uniform(0, 255)
        noisy = np.clip(pixels + rng.normal(scale=3, size=pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / CLASSES[0 if is_bright else 1] / f"{i:05d}-g{seed}x{i // group}.png")
    return folder
