"""The real TensorRT bindings, imported against empty stand-ins for the libraries they link.

A wheel of a megabyte is fetched with pip and unpacked. The functions that it lacks are named by nm, and gcc makes
libraries of functions that do nothing. Then every public name imports, without a GPU and without TensorRT; calling
anything would crash, so each import has a process of its own. What was found is kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEELS = {
    "8.6": ("tensorrt-bindings", "8.6.1"),
    "10.3": ("tensorrt-cu12-bindings", "10.3.0"),
    "10.7": ("tensorrt-cu12-bindings", "10.7.0"),
    "10.16": ("tensorrt-cu12-bindings", "10.16.1.11"),
    "11.0": ("tensorrt-cu13-bindings", "11.0.0.114"),
    "11.4": ("tensorrt-cu13-bindings", "11.4.0.106"),
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NO_INDEX = (
    r"NewConnectionError|ConnectTimeout|timed out|Temporary failure|Name or service|ProxyError|Network is unreach"
)

DUMP = """
import inspect, json, os, sys, warnings
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
def text(cls, name):
    value = inspect.getattr_static(cls, name)
    value = value.fget if isinstance(value, property) else value
    return (getattr(value, "__doc__", None) or "").strip().split("\\n")[0]
found = {}
for name, value in vars(trt).items():
    if inspect.isclass(value) and not name.startswith("_"):
        found[name] = {m: text(value, m) for m in dir(value) if not m.startswith("_")}
    elif not name.startswith("_"):
        found[name] = {}
json.dump({"version": trt.__version__, "names": found}, open(sys.argv[2], "w"))
os._exit(0)  # without libraries behind it, the bindings crash on their way out
"""


class NotHere(Exception):
    """Why the bindings cannot be had. index: whether a package registry answered."""

    def __init__(self, why: str, *, index: bool = True) -> None:
        super().__init__(why)
        self.index = index


@dataclass(frozen=True)
class Api:
    """names: "Builder" -> {"create_network": "create_network(self: …) -> tensorrt.tensorrt.INetworkDefinition", …}."""

    version: str
    names: dict[str, dict[str, str]]

    def has(self, kind: str, name: str) -> bool:
        return name in self.names.get(kind, ())

    def returns(self, kind: str, name: str) -> str | None:
        """The class that a method or property gives, by its signature."""
        found = re.search(r"-> (?:tensorrt\w*\.)+(\w+)", self.names.get(kind, {}).get(name, ""))
        return found[1] if found else None


def api(family: str) -> Api:
    """Every public name of one version.

    Raises:
        NotHere: no compiler, no package registry, or no wheel for any Python that is here.
    """
    package, version = WHEELS[family]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd-tests" / "bindings"
    kept = base / f"{package}-{version}-{platform.machine()}.json"
    if not kept.is_file():
        work = base / f"{package}-{version}.{os.getpid()}"
        try:
            _dump(package, version, work, kept)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    found = json.loads(kept.read_text())
    return Api(found["version"], found["names"])


def _dump(package: str, version: str, work: Path, kept: Path) -> None:
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            raise NotHere(f"no {tool} here")
    said: list[NotHere] = []
    for python in _pythons():
        try:
            wheel = download(package, version, work / python, python=python)
        except NotHere as error:
            said.append(error)
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / python)
        (library,) = (work / python).glob("tensorrt_bindings/tensorrt.so")
        _stand_ins(library, work / python / "lib")
        out = work / "names.json"
        environment = {**os.environ, "LD_LIBRARY_PATH": str(work / python / "lib")}
        command = [shutil.which(f"python{python}") or sys.executable, "-c", DUMP, str(work / python), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{wheel.name} does not import:\n{done.stderr}"
        out.replace(kept)
        return
    raise NotHere("; ".join(dict.fromkeys(map(str, said))), index=any(error.index for error in said))


def _pythons() -> list[str]:
    """The running one first, then others that really start."""
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [mine, *(p for p in PYTHONS if p != mine and _starts(p))]


def _starts(python: str) -> bool:
    path = shutil.which(f"python{python}")
    return path is not None and subprocess.run([path, "-V"], capture_output=True, check=False).returncode == 0


def download(package: str, version: str, folder: Path, *, python: str) -> Path:
    """The wheel of this machine's platform for a version of Python, from a package registry.

    Raises:
        NotHere: None answers, or it has no such wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{glibc}_{platform.machine()}" for glibc in (17, 28, 35)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--timeout=10", "--retries=1", f"--python-version={python}", *platforms]
    done = subprocess.run(
        [*command, f"--dest={folder}", f"{package}=={version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = f"no {package} {version} for Python {python} on {platform.machine()}"
        if re.search(NO_INDEX, done.stderr) or "No module named pip" in done.stderr:
            raise NotHere("no package registry answers", index=False)
        raise NotHere(why)
    return next(folder.glob("*.whl"))


def _stand_ins(library: Path, folder: Path) -> None:
    """Libraries by the names that `library` needs; the first has all functions that nothing here defines."""
    folder.mkdir()
    needed = re.findall(r"NEEDED.*\[(libnv[^\]]+)\]", _say("readelf", "-d", str(library)))
    here = ctypes.CDLL(None)
    lines = [line.split() for line in _say("nm", "-D", "--undefined-only", str(library)).splitlines()]
    functions = [name for kind, name in lines if kind == "U" and "@" not in name and not hasattr(here, name)]
    functions = [name for name in functions if not re.match(r"_?Py", name)]
    for i, name in enumerate(needed):
        source = folder / f"{name}.c"
        source.write_text("".join(f"void *{f}(void) {{ return 0; }}\n" for f in functions) if i == 0 else "")
        _say("gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source))


def _say(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
