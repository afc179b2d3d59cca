"""Write hugging_face.npz: what the image processors of Hugging Face make of the test's pictures.

Run where `transformers` is installed: python tests/conversion/hugging_face.py. Values are pixels 0..255, from before
scaling and standardisation, in uint8.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

if __name__ == "__main__":
    import importlib

    from test_preprocessing import HUGGING_FACE, MOMENTS, ORACLE, SIZES, picture

    arrays = {}
    for kind, table in HUGGING_FACE.items():
        name = kind.removesuffix("ImageProcessor").lower()
        module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
        settings = {**MOMENTS, **table}
        processor = getattr(module, f"{kind}Pil")(**settings)
        for size in SIZES[:3]:
            values = np.asarray(processor(picture(*size), return_tensors="np")["pixel_values"])[0].astype(np.float64)
            mean, std = (np.reshape(settings[k], (3, 1, 1)) for k in ("image_mean", "image_std"))
            if table.get("include_top"):
                values = values * std
            if table.get("do_normalize", True):
                values = values * std + mean
            values = (values + bool(table.get("rescale_offset"))) / table.get("rescale_factor", 1 / 255)
            pixels = np.rint(values)
            assert np.abs(values - pixels).max() < 0.02
            arrays[f"{kind}-{size[0]}x{size[1]}"] = pixels.astype(np.uint8)
    np.savez_compressed(ORACLE, **arrays)
