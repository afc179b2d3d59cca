"""CUDA memory, streams and graphs through cuda-python or PyCUDA."""
