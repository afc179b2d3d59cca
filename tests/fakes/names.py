"""What the fakes of TensorRT share."""

from __future__ import annotations

from typing import Any

import onnx

QDQ = ("QuantizeLinear", "DequantizeLinear")


class Named:
    """An object that has the names of the real class and no others, to read and to write."""

    _names: frozenset[str] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._names:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in type(self)._names:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        super().__setattr__(name, value)


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Input and output to its shape, -1 where it is dynamic."""
    values = [*model.graph.input, *model.graph.output]
    return {v.name: tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim) for v in values}
