"""The base folder, made once for all fault tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from base import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "base"
    make_base(folder)
    return folder
