"""Pooled features against NumPy, and their cache, on real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.small_classifiers import Residual, Tokens, exported
from torch import nn

from edgekd.conversion.cut_points import candidates, find_cut_points
from edgekd.conversion.features import features, opened_graph
from edgekd.conversion.graph_rewriting import session
from edgekd.conversion.pooling import pooled_size
from edgekd.data.images import load
from edgekd.data.preprocess import Preprocess


@pytest.mark.parametrize("module", [Residual(), Tokens()], ids=["maps", "tokens"])
def test_features_are_mean_maximum_norm_and_class_token(module: nn.Module, cells: Path, tmp_path: Path) -> None:
    model, files = exported(module), sorted(cells.rglob("*.png"))[:5]
    cuts = candidates(find_cut_points(model))
    with features(model, cuts, [(f, f.name) for f in files], Preprocess(16), folder=tmp_path) as found:
        images = np.stack([load(f, Preprocess(16)) for f in files])
        for cut, pooled in zip(cuts, found.pooled):
            assert pooled.shape == (5, 1, pooled_size(cut))
            expected = []
            for x in session(model, outputs=cut.tensors).run(list(cut.tensors), {"images": images}):
                axes = (2, 3) if x.ndim == 4 else (1,)
                expected += [x.mean(axes), x.max(axes), np.sqrt((x**2).sum(axes))]
                expected += [x[:, 0]] if x.shape[1:] == (17, 12) else []
            np.testing.assert_allclose(pooled[:, 0], np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.logits[:, 0], opened_graph(model)(images)[0], rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_a_second_run_reads_no_picture_again(cells: Path, tmp_path: Path) -> None:
    model, files = exported(Residual()), sorted(cells.rglob("*.png"))[:40]
    cuts, cache = candidates(find_cut_points(model)), tmp_path / "cache"

    def computed(pictures: list[tuple[Path, str]], views: int = 2, network: onnx.ModelProto = model) -> np.ndarray:
        with features(network, cuts, pictures, Preprocess(16), folder=tmp_path, cache=cache, views=views) as found:
            return np.array(found.pooled[0])

    first = computed([(f, f.name) for f in files])
    assert not np.array_equal(first[:, 0], first[:, 1])  # the second view is a crop
    gone = [(tmp_path / "gone", f.name) for f in files]
    np.testing.assert_array_equal(computed(gone), first)
    for other in ({"views": 1}, {"network": exported(Residual())}):
        with pytest.raises(Exception, match="no such file"):
            computed(gone, **other)
    assert len(list(cache.iterdir())) == 1
