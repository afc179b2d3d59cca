"""The manifest across versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from edgekd.artifacts.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from edgekd.artifacts.metadata import Exit, ModelMetadata
from edgekd.artifacts.recipe import Recipe
from edgekd.data.preprocess import Preprocess
from edgekd.errors import ArtifactError
from edgekd.host import host_info
from edgekd.policy import Policy


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    metadata = ModelMetadata("n", ("a", "b"), Preprocess(32), (Exit("exit_0", ()),), Policy((1.0,)))
    write_manifest(tmp_path, Manifest(metadata, "onnxruntime", "1", Recipe("fp32"), {}, host_info(), {}, ""))
    table = json.loads((tmp_path / MANIFEST).read_text())
    del table["certificate"], table["attempts"], table["metadata"]["policy"]["defer_below"]

    def put(digest: str) -> None:
        table["digest"] = digest
        (tmp_path / MANIFEST).write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")

    put("")
    put(hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest())
    found = read_manifest(tmp_path)
    assert (found.certificate, found.attempts, found.metadata) == (None, (), metadata)
    table["backend_version"] = "2"
    put(table["digest"])
    with pytest.raises(ArtifactError, match="was edited"):
        read_manifest(tmp_path)
