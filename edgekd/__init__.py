"""Early-exit image classifiers: distillation, compilation for edge devices, and inference."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from edgekd._version import __version__
from edgekd.errors import EdgekdError

# Telemetry is off. ONNX Runtime and huggingface_hub read these variables on import, and child processes inherit them.
# OpenVINO, which counts its imports, has no such variable, but runs without its telemetry package.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from edgekd.conversion.modules import export_module as export_module
    from edgekd.runtime.classifier import Classifier as Classifier
    from edgekd.runtime.classifier import Prediction as Prediction

__all__ = ["Classifier", "EdgekdError", "Prediction", "__version__", "export_module"]


def __getattr__(name: str) -> Any:
    """Import Classifier, Prediction or export_module on first access."""
    if name == "export_module":
        from edgekd.conversion import modules

        return modules.export_module
    if name in ("Classifier", "Prediction"):
        from edgekd.runtime import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'edgekd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
