"""Run the tests that need no torch on every Python that pyproject.toml names and this machine has.

python tests/pythons.py FOLDER

Each version gets a virtual environment in FOLDER with what a small device has: edgekd, ONNX Runtime, and what the tests
themselves use. helpers/light.py tells which tests can run there. The output of each is in FOLDER/VERSION.log.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("onnxruntime", "pytest", "pytest-timeout", "scipy", "cryptography")


def versions() -> list[str]:
    """`3.10` and so on, from the classifiers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def candidates(version: str) -> Iterator[str]:
    """Paths that may be a Python of this version."""
    yield from (path for path in (shutil.which(f"python{version}"), sys.executable) if path)
    for folder in (Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python"):
        yield from (str(path) for path in sorted(folder.glob(f"*{version}.*/bin/python{version}"), reverse=True))


def interpreter(version: str) -> str | None:
    """The first candidate that starts, is of this version and can make environments."""
    check = f"import ensurepip, sys; sys.exit('.'.join(map(str, sys.version_info[:2])) != '{version}')"
    for path in candidates(version):
        if subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            return path
    return None


def run(python: str, folder: Path) -> tuple[bool, str]:
    """Return whether the tests pass in a fresh environment, and their last line."""
    own = folder / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    commands = [
        [python, "-m", "venv", "--clear", folder],
        [own, *install, "--editable", ROOT, *PACKAGES],
        [own, "-m", "pytest", "-v", "--durations=0", "--tb=short"],
    ]
    begun = time.monotonic()
    with folder.with_suffix(folder.suffix + ".log").open("w+") as log:
        for command in commands:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                break
        log.seek(0)
        lines = log.read().splitlines()
    last = lines[-1].strip("= ") if lines else ""
    return done.returncode == 0, f"{last} ({time.monotonic() - begun:.0f} s in all)"


def main(folder: Path) -> int:
    """Print a line for each version; return 1 if one fails, or if there is none to run."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for version in versions():
        if python := interpreter(version):
            passed, line = run(python, folder / version)
            results.append(passed)
            print(f"{version}: {'passed' if passed else 'FAILED'}: {line}; see {folder / version}.log", flush=True)
        else:
            print(f"{version}: not run: no such Python here", flush=True)
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
