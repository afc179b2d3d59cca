"""From student.onnx to an engine folder: build, accuracy gate, timing."""
