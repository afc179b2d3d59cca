"""Progress where stderr is no terminal: a line now and then, with rate and time left."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from edgekd.cli import common


def test_progress_is_printed_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a second for a minute: the first line after 5 s, then one every 15 s."""
    now = [100.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with common.bar("train") as progress:
        for done in range(1, 61):
            now[0] += 1
            progress(done, 60, 0.5)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["5/60", "20/60", "35/60", "50/60"]
    assert all(re.fullmatch(r"train: \d+/60 (\d:\d\d:\d\d left )?\S+/s loss 0.500", line) for line in lines), lines


def test_short_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with common.bar("read images") as progress:
        progress(3, 3)
    assert capsys.readouterr() == ("", "")
