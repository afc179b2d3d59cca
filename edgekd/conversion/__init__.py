"""Conversion of a trained classifier, from any framework, to a student.onnx with exit heads on the frozen network."""
