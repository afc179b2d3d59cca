"""The checkers are pinned, the pins are what runs, and pre-commit's hooks refuse what `make check` would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("pre_commit", reason="the extra dev is not installed")
ROOT = Path(__file__).resolve().parents[1]
CHECKERS = ("ruff", "mypy")


@pytest.mark.parametrize("name", CHECKERS)
def test_what_is_installed_is_what_is_pinned(name: str) -> None:
    pins = re.findall(rf'"{name}([^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pins[0] == f"=={version(name)}"


def test_hooks_are_the_checks_of_make() -> None:
    """One pin is enough: both run the programs of .venv, and a hook that names a version would be a second one."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checks = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert checks
    programs = set(re.findall(r"\$\(BIN\)/(\S+)", checks[1]))
    assert programs == {"ruff", "mypy", "lint-imports"}
    assert set(re.findall(r"entry: \.venv/bin/(\S+)", hooks)) == programs
    assert hooks.count("entry:") == hooks.count("entry: .venv/bin/")
    assert "==" not in hooks
    assert "rev:" not in hooks


def test_a_hook_refuses_and_mends(tmp_path: Path) -> None:
    """A repository of one file with an unused import and bad spacing: two hooks fail, and both faults are mended."""
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "ruff").symlink_to(Path(sys.executable).with_name("ruff"))
    (tmp_path / "bad.py").write_text("import os\nx=1\n")
    env = os.environ | {"PRE_COMMIT_HOME": str(tmp_path / "cache")}
    for command in (["git", "init", "-q"], ["git", "add", "bad.py"]):
        subprocess.run(command, cwd=tmp_path, check=True)

    def hooks() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pre_commit", "run", "--all-files"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    first = hooks()
    assert first.returncode == 1, first.stdout + first.stderr
    assert first.stdout.count("files were modified by this hook") == 2, first.stdout
    assert (tmp_path / "bad.py").read_text() == "x = 1\n"
    assert hooks().returncode == 0
