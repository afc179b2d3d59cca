"""The base folder of the fault tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.base import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cells/, run/, student.onnx, student.engine/ and record.json: see base.py."""
    folder = tmp_path_factory.mktemp("faults") / "base"
    make_base(folder)
    return folder
