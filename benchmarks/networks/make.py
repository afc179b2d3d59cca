"""Train small classifiers in several frameworks and export each to ONNX with the framework's own exporter.

    python benchmarks/networks/make.py CELLS WEIGHTS OUT NAME ...

CELLS has train/, val/ and test/ with a folder for each class; WEIGHTS has ImageNet weights as safetensors. Each
OUT/NAME receives model.onnx, classes.txt, the preprocessing configuration that the framework writes, facts.json (with
the options that `edgekd add-exits` needs), and framework.npz: paths, labels and answers of the test images through the
framework's own preprocessing and run time. A network needs its framework only: use one environment for each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64
"""Side of the input in pixels; small, so that a network takes minutes on one core."""
EPOCHS = 2
Transform = Callable[[Image.Image], Any]


class Job:
    """A network's folder and the images."""

    def __init__(self, name: str, cells: Path, weights: Path, out: Path) -> None:
        self.name, self.cells, self.weights, self.out = name, cells, weights, out / name
        self.classes = sorted(p.name for p in (cells / "train").iterdir())
        self.started = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)

    def images(self, subset: str) -> tuple[list[Path], np.ndarray]:
        """Return the paths and labels of a subset."""
        paths = sorted((self.cells / subset).glob("*/*.*"))
        return paths, np.array([self.classes.index(p.parent.name) for p in paths])

    def finish(self, answers: np.ndarray, options: Sequence[str], **facts: Any) -> None:
        """Write what belongs to a finished network; `answers` are those to the test images."""
        paths, labels = self.images("test")
        accuracy = float((answers.argmax(1) == labels).mean())
        names = [str(p.relative_to(self.cells)) for p in paths]
        np.savez(self.out / "framework.npz", paths=names, labels=labels, answers=answers)
        (self.out / "classes.txt").write_text("\n".join(self.classes) + "\n")
        facts |= {"options": list(options), "accuracy": accuracy, "seconds": round(time.monotonic() - self.started)}
        (self.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{self.name}: {accuracy:.1%} of the test images, {facts['seconds']} s", flush=True)


def _linear(inputs: Sequence[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights (C, D) and biases of a logistic regression on a layer's inputs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(np.concatenate(inputs))
    fitted = LogisticRegression(C=0.01, max_iter=500).fit(scaler.transform(np.concatenate(inputs)), labels)
    weights = fitted.coef_ / scaler.scale_
    return weights.astype(np.float32), (fitted.intercept_ - weights @ scaler.mean_).astype(np.float32)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def _tensor(paths: Iterable[Path], transform: Transform) -> Any:
    import torch

    return torch.stack([transform(Image.open(p).convert("RGB")) for p in paths])


def _train(model: Any, job: Job, transform: Transform, *, lr: float, epochs: int = EPOCHS) -> None:
    """Train on cached, preprocessed images: AdamW, one cycle, flips and transposes."""
    import torch

    model.to(memory_format=torch.channels_last)
    paths, labels = job.images("train")
    images, targets = _tensor(paths, transform), torch.from_numpy(labels)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr, weight_decay=0.05)
    steps = epochs * (len(images) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    rng = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=rng).split(32)[: len(images) // 32]:
            batch = images[chosen]
            flips = [d for d in (2, 3) if torch.rand(1, generator=rng) < 0.5]
            batch = batch.flip(flips) if flips else batch
            batch = batch.transpose(2, 3) if torch.rand(1, generator=rng) < 0.5 else batch
            logits = _logits(model(batch.contiguous(memory_format=torch.channels_last)))
            loss = torch.nn.functional.cross_entropy(logits, targets[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"{job.name}: epoch {epoch + 1}, loss {total / (len(images) // 32):.3f}", flush=True)
    model.to(memory_format=torch.contiguous_format).eval()


def _fit_head(model: Any, head: Any, job: Job, transform: Transform, *, is_new: bool = False) -> None:
    """Fit the last layer alone, by logistic regression on its inputs; statistics of new batch norms are measured."""
    import torch

    paths, labels = job.images("train")
    inputs: list[Any] = []
    hook = head.register_forward_hook(lambda _, given, __: inputs.append(given[0].numpy()))
    images = _tensor(paths, transform)
    with torch.inference_mode():
        if is_new:
            for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
                norm.momentum = None  # the mean over all batches
            for chosen in torch.randperm(len(images))[:640].split(64):
                model.train()(images[chosen])
            inputs.clear()
        for batch in images.split(64):
            model.eval()(batch)
    hook.remove()
    weights, biases = _linear(inputs, labels)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights))
        head.bias.copy_(torch.from_numpy(biases))


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _answers(model: Any, job: Job, transform: Transform) -> np.ndarray:
    import torch

    with torch.inference_mode():
        batches = _tensor(job.images("test")[0], transform).split(64)
        return torch.cat([_logits(model(b)).float() for b in batches]).numpy()


def _export(model: Any, job: Job, *, opset: int, dynamo: bool, size: int = SIZE, batch: int | None = None) -> None:
    import torch

    example = torch.rand(batch or 2, 3, size, size)
    file = str(job.out / "model.onnx")
    shape: dict[str, Any] = {}
    if batch is None and dynamo:
        shape = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    elif batch is None:
        shape = {"dynamic_axes": {"input": {0: "batch"}, "output": {0: "batch"}}}
    names = {"input_names": ["input"], "output_names": ["output"]}
    torch.onnx.export(model, (example,), file, opset_version=opset, dynamo=dynamo, **names, **shape)


def torchvision(job: Job, name: str, *, imagenet: bool, opset: int, batch: int | None = None) -> None:
    """A torchvision network, with ImageNet weights as they are or fine-tuned on the cells; the older exporter."""
    import torch
    from safetensors.torch import load_file
    from torchvision import models
    from torchvision import transforms as T

    model = models.get_model(name)
    model.load_state_dict(
        {k: v.float() for k, v in load_file(job.weights / f"{name}.safetensors").items()}, strict=True
    )
    size, resize = (224, 256) if imagenet else (96, 110)
    transform = T.Compose(
        [T.Resize(resize), T.CenterCrop(size), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    options = ["--preprocess", "imagenet", "--resize-size", str(resize)]
    if imagenet:
        job.classes = list(models.get_model_weights(name).DEFAULT.meta["categories"])
    else:
        old = model.fc if name == "resnet50" else model.classifier[-1]
        head = torch.nn.Linear(old.in_features, len(job.classes))
        if name == "resnet50":
            model.fc = head
        else:
            model.classifier[-1] = head
        _fit_head(model, head, job, transform)
    model.eval()
    _export(model, job, opset=opset, dynamo=False, size=size, batch=batch)
    facts = {"exporter": "torch.onnx (TorchScript)", "framework": f"torchvision {version('torchvision')}"}
    facts |= {"size": size, "resize": resize, "trained": "ImageNet" if imagenet else "ImageNet, last layer SIPaKMeD"}
    if imagenet:
        (job.out / "classes.txt").write_text("\n".join(job.classes) + "\n")
        (job.out / "facts.json").write_text(json.dumps({**facts, "options": options}, indent=1))
    else:
        job.finish(_answers(model, job, transform), options, **facts)


def timm(
    job: Job,
    name: str,
    *,
    opset: int,
    dynamo: bool,
    lr: float = 0.0,
    weights: bool = False,
    epochs: int = EPOCHS,
    **kwargs: Any,
) -> None:
    """A timm network with the config.json of timm's hub format; either exporter. Without `lr`, a random backbone."""
    import torch
    from safetensors.torch import load_file
    from timm import create_model
    from timm.data import create_transform, resolve_data_config
    from timm.models._hub import save_config_for_hf

    torch.manual_seed(0)
    overlay = {"input_size": (3, SIZE, SIZE), "num_classes": len(job.classes)}
    model = create_model(name, num_classes=len(job.classes), pretrained_cfg_overlay=overlay, **kwargs)
    if weights:
        state = {k: v.float() for k, v in load_file(job.weights / f"{name}.safetensors").items()}
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in state.items() if own[k].shape == v.shape}, strict=False)
    transform = create_transform(**resolve_data_config({}, model=model))
    if lr:
        _train(model, job, transform, lr=lr, epochs=epochs)
    else:
        _fit_head(model, model.get_classifier(), job, transform, is_new=True)
    save_config_for_hf(model, str(job.out / "config.json"), {"label_names": job.classes})
    _export(model, job, opset=opset, dynamo=dynamo)
    job.finish(
        _answers(model, job, transform),
        ["--preprocess", "config.json"],
        exporter="torch.onnx (dynamo)" if dynamo else "torch.onnx (TorchScript)",
        framework=f"timm {version('timm')}",
        trained="ImageNet, then SIPaKMeD" if weights else "SIPaKMeD" if lr else "SIPaKMeD: last layer alone",
    )


def transformers(job: Job, *, opset: int) -> None:
    """A small Swin of transformers with its preprocessor_config.json; the newer exporter cannot trace it."""
    import torch
    from transformers import SwinConfig, SwinForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    names = dict(enumerate(job.classes))
    config = SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=48, depths=[2, 2, 4], num_heads=[2, 4, 8], window_size=4,
        id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    model = SwinForImageClassification(config)
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3)

    def transform(image: Image.Image) -> Any:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    _fit_head(model, model.classifier, job, transform, is_new=True)
    processor.save_pretrained(job.out)
    config.save_pretrained(job.out)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(pixel_values).logits
            return logits

    _export(Logits().eval(), job, opset=opset, dynamo=False)
    job.finish(
        _answers(model, job, transform),
        ["--preprocess", "preprocessor_config.json"],
        exporter="torch.onnx (TorchScript)",
        framework=f"transformers {version('transformers')}",
        trained="SIPaKMeD: last layer alone",
    )


def ultralytics(job: Job) -> None:
    """An Ultralytics classifier with its own export: softmax, and names in the metadata."""
    import torch
    from ultralytics import YOLO
    from ultralytics.data.augment import classify_transforms

    torch.manual_seed(0)
    model, transform = YOLO("yolo11n-cls.yaml"), classify_transforms(SIZE)
    network = model.model
    network.names = dict(enumerate(job.classes))
    head = network.model[-1]
    head.linear = torch.nn.Linear(head.linear.in_features, len(job.classes))
    _fit_head(network, head.linear, job, transform, is_new=True)
    shutil.move(model.export(format="onnx", imgsz=SIZE, dynamic=True, simplify=False), job.out / "model.onnx")
    with torch.inference_mode():
        images = _tensor(job.images("test")[0], transform).split(64)
        answers = torch.cat([out[0] if isinstance(out := network(b), tuple) else out for b in images]).numpy()
    job.finish(
        answers,
        ["--preprocess", "ultralytics", "--image-size", str(SIZE)],
        exporter=f"ultralytics {version('ultralytics')}",
        framework=f"ultralytics {version('ultralytics')}",
        trained="SIPaKMeD: last layer alone",
    )


# --- other frameworks ------------------------------------------------------------------------------------------------


def keras(job: Job) -> None:
    """Keras's MobileNet behind a rescaling layer, with softmax and NHWC input, through tf2onnx."""
    import tensorflow as tf
    import tf2onnx

    tf.keras.utils.set_random_seed(0)

    def load(subset: str, shuffle: bool) -> Any:
        return tf.keras.utils.image_dataset_from_directory(
            job.cells / subset, image_size=(SIZE, SIZE), batch_size=32, shuffle=shuffle, seed=0
        )

    base = tf.keras.applications.MobileNet(
        alpha=0.5, weights=None, classes=len(job.classes), input_shape=(SIZE, SIZE, 3)
    )
    for layer in base.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = 0.9  # in so few steps, 0.99 leaves too much of the initial variance
    images = tf.keras.Input((SIZE, SIZE, 3))
    model = tf.keras.Model(images, base(tf.keras.layers.Rescaling(1 / 127.5, -1)(images)))
    flips = tf.keras.layers.RandomFlip()
    train = load("train", True).cache().map(lambda x, y: (flips(x, training=True), y))
    rate = tf.keras.optimizers.schedules.CosineDecay(2e-3, 6 * 76)
    model.compile(tf.keras.optimizers.AdamW(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train, epochs=6, verbose=2)
    signature = (tf.TensorSpec((None, SIZE, SIZE, 3), tf.float32, name="images"),)
    tf2onnx.convert.from_keras(model, signature, opset=15, output_path=str(job.out / "model.onnx"))
    test = load("test", False)
    assert [Path(p) for p in test.file_paths] == job.images("test")[0]
    job.finish(
        model.predict(test, verbose=0),
        ["--preprocess", "none", "--resize", "stretch"],
        exporter=f"tf2onnx {version('tf2onnx')}",
        framework=f"Keras {version('keras')}",
        trained="SIPaKMeD",
    )


def paddle(job: Job) -> None:
    """PaddlePaddle's MobileNetV1 through paddle2onnx."""
    import paddle
    from paddle.vision import models
    from paddle.vision import transforms as T

    paddle.seed(0)
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    transform = T.Compose([T.Resize(72), T.CenterCrop(SIZE), T.Transpose(), T.Normalize(mean, std)])

    def load(subset: str) -> list[Any]:
        images = np.stack([transform(Image.open(p).convert("RGB")) for p in job.images(subset)[0]])
        return [paddle.to_tensor(part) for part in np.array_split(images.astype(np.float32), len(images) // 60)]

    model, batches, inputs = models.mobilenet_v1(scale=0.5, num_classes=len(job.classes)), load("train"), []
    hook = model.fc.register_forward_pre_hook(lambda _, given: inputs.append(given[0].numpy()))
    for norm in (layer for layer in model.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)):
        norm._momentum = 0.5
    with paddle.no_grad():
        for batch in batches:
            model(batch)  # statistics of the batch norms
        inputs.clear()
        model.eval()
        for batch in batches:
            model(batch)
    hook.remove()
    weights, biases = _linear(inputs, job.images("train")[1])
    model.fc.weight.set_value(weights.T.copy())
    model.fc.bias.set_value(biases)
    model.eval()
    spec = [paddle.static.InputSpec([None, 3, SIZE, SIZE], "float32", "x")]
    paddle.onnx.export(model, str(job.out / "model"), input_spec=spec, opset_version=14)
    with paddle.no_grad():
        answers = np.concatenate([model(batch).numpy() for batch in load("test")])
    job.finish(
        answers,
        ["--preprocess", "imagenet", "--resize-size", "72"],
        exporter=f"paddle2onnx {version('paddle2onnx')}",
        framework=f"PaddlePaddle {version('paddlepaddle')}",
        trained="SIPaKMeD: last layer alone",
    )


# --- other types of input --------------------------------------------------------------------------------------------


def fp16(job: Job, base: str) -> None:
    """A finished network in half precision, input and output too."""
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(job.out.parent / base / "model.onnx"))
    onnx.save(model, job.out / "model.onnx")
    _inherit(job, base, exporter=f"onnxconverter-common {version('onnxconverter-common')}")


def uint8(job: Job, base: str) -> None:
    """A finished network behind a uint8 NHWC input that it scales by itself: timm's `inception` mean and deviation."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(job.out.parent / base / "model.onnx")
    old, shape = model.graph.input[0].name, ["batch", SIZE, SIZE, 3]
    constants = {"half_range": np.float32(127.5), "one": np.float32(1)}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), k) for k, v in constants.items())
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "half_range"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["centred"]),
        helper.make_node("Transpose", ["centred"], [old], perm=[0, 3, 1, 2]),
    ]
    nodes += model.graph.node
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape))
    onnx.checker.check_model(model)
    onnx.save(model, job.out / "model.onnx")
    _inherit(
        job, base, options=["--resize", "shorter", "--resize-size", str(int(SIZE / 0.875))], exporter="onnx.helper"
    )


def _inherit(job: Job, base: str, **facts: Any) -> None:
    for file in ("classes.txt", "config.json", "framework.npz"):
        if (job.out.parent / base / file).exists():
            shutil.copy(job.out.parent / base / file, job.out / file)
    old = json.loads((job.out.parent / base / "facts.json").read_text())
    (job.out / "facts.json").write_text(json.dumps({**old, **facts, "base": base}, indent=1) + "\n")


NETWORKS: dict[str, Callable[[Job], None]] = {
    "mobilenet_v2-imagenet": lambda job: torchvision(job, "mobilenet_v2", imagenet=True, opset=13),
    "resnet50-imagenet": lambda job: torchvision(job, "resnet50", imagenet=True, opset=17),
    "resnet50": lambda job: torchvision(job, "resnet50", imagenet=False, opset=11),
    "mobilenet_v2": lambda job: torchvision(job, "mobilenet_v2", imagenet=False, opset=12, batch=1),
    "mobilenetv3": lambda job: timm(
        job, "tf_mobilenetv3_small_100", lr=1e-3, opset=20, dynamo=True, weights=True, epochs=4
    ),
    "vit_tiny": lambda job: timm(job, "vit_tiny_patch16_224", opset=18, dynamo=True, img_size=SIZE),
    "convnext_atto": lambda job: timm(job, "convnext_atto", opset=21, dynamo=True),
    "efficientnet_b0": lambda job: timm(job, "efficientnet_b0", opset=16, dynamo=False),
    "densenet121": lambda job: timm(job, "densenet121", opset=14, dynamo=False),
    "regnety_002": lambda job: timm(job, "regnety_002", opset=18, dynamo=True),
    "mobilevit_xxs": lambda job: timm(job, "mobilevit_xxs", opset=17, dynamo=False),
    "swin": lambda job: transformers(job, opset=17),
    "yolo11n-cls": ultralytics,
    "keras-mobilenet": keras,
    "paddle-mobilenet_v1": paddle,
    "mobilenet_v2-fp16": lambda job: fp16(job, "mobilenet_v2"),
    "mobilenetv3-uint8": lambda job: uint8(job, "mobilenetv3"),
}


def main() -> None:
    """Make the networks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument in ("cells", "weights", "out"):
        parser.add_argument(argument, type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=NETWORKS)
    arguments = parser.parse_args()
    for name in arguments.names:
        try:
            NETWORKS[name](Job(name, arguments.cells.resolve(), arguments.weights, arguments.out.resolve()))
        except ImportError as error:
            print(f"{name}: not made: {error}", flush=True)


if __name__ == "__main__":
    main()
