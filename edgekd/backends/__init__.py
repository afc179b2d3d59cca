"""Backends: compiling and running ONNX graphs on a device."""

BUILTIN = {
    "onnxruntime": "edgekd.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "edgekd.backends.openvino:OpenVinoBackend",
    "ncnn": "edgekd.backends.ncnn:NcnnBackend",
    "tensorrt": "edgekd.backends.tensorrt.backend:TensorRTBackend",
    "tensorrt-rtx": "edgekd.backends.tensorrt.rtx:TensorRTRtxBackend",
}
"""edgekd's own backends for `edgekd.backends.base.BACKENDS`; here, their names cost no import."""
