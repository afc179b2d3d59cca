"""Artefacts on disk: student.onnx with its metadata, engine folders with their manifest, recipes, partitioning."""
