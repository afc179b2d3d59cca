"""Carry out the installs of docs/jetson.md and docs/Dockerfile.jetson without a Jetson, and run edgekd there.

QEMU's user-mode emulation runs an aarch64 root file system on an x86-64 PC with Linux. It has no GPU and no TensorRT,
so this shows that the light set installs and works on ONNX Runtime, not more. It is slow; its times mean nothing.
As root,
with QEMU 10 (7.2 crashes when ONNX Runtime 1.32 is imported):

    apt-get install qemu-user-static debootstrap
    debootstrap --arch arm64 --components main,universe --include python3-venv jammy ROOT
    python docs/jetson/emulate.py ROOT BENCH > docs/jetson/emulated-3.10.log

`jammy` has Python 3.10, as JetPack 6; `noble` has 3.12, as JetPack 7. BENCH holds student.onnx, split.json and the
images in cells, as in docs/jetson.md. This Python must have edgekd and ONNX Runtime: its predictions are compared with
those of the emulator. What is run there is read from the page and the Dockerfile.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGE, DOCKERFILE = REPO / "docs/jetson.md", REPO / "docs/Dockerfile.jetson"
STRANGER = 4321
"""A user id that the image does not know, as `docker run --user` may give it."""
Table = list[dict[str, str]]
Tables = dict[str, Table]
"""Recipe to the predictions' rows."""
TOLERANCE = {"fp32": 1e-4, "int8": 0.05}
"""How far a probability may be from that of this machine."""
VENV = {"PATH": "/home/jetson/edgekd-venv/bin:/usr/local/bin:/usr/bin:/bin"}
LINES = 12
"""How much of a command's output is kept."""
NAMES = """
import operator, pathlib, re, edgekd.backends.cuda as own
try: import cuda.bindings.runtime as runtime
except ImportError: import cuda.cudart as runtime
folder = pathlib.Path(own.__file__).parent
for file, needed in ((folder / "cuda_python.py", True), (folder.parent / "tensorrt/device_exit.py", False)):
    used = set(re.findall(r"runtime[.](cuda[A-Z][A-Za-z0-9]*)", file.read_text()))
    missing = sorted(name for name in used if not hasattr(runtime, name))
    print(f"{file.name} uses {len(used)} names, missing: {', '.join(missing) or 'none'}")
    assert len(used) > 4
    assert not (needed and missing)
"""


class Failed(Exception):
    """A step that must succeed did not, or the other way round."""


class Machine:
    """The root file system, entered as one of its users."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def sh(self, command: str, *, user: str = "root", where: str = "/", show: str = "", **environment: str) -> str:
        """Run a command, print it and the end of its output, and return the output.

        Raises:
            Failed: It failed.
        """
        uid, gid, groups, home = self.user(user)
        variables = {"HOME": home, "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
        variables |= {"DEBIAN_FRONTEND": "noninteractive"} | environment
        words = ["chroot", f"--userspec={uid}:{gid}", f"--groups={groups}", str(self.root), "/usr/bin/env", "-i"]
        words += [f"{key}={value}" for key, value in variables.items()]
        say(f"\n$ {show or command}" + (f"   # as {user}" if user != "root" else ""))
        begun = time.monotonic()
        done = subprocess.run(
            [*words, "sh", "-ec", f"cd {where}\n{command}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        kept = [line for line in done.stdout.splitlines() if not re.search(r"https?://|^Looking in|━", line)]
        say("\n".join(f"    {line}" for line in kept[-LINES:]))
        say(f"    [exit code {done.returncode}, {time.monotonic() - begun:.0f} s]")
        if done.returncode:
            raise Failed(command)
        return done.stdout

    def user(self, name: str) -> tuple[int, int, str, str]:
        """Its user id, group id, groups and home."""
        if name.isdigit():
            return int(name), int(name), str(self.gid("video")), "/"
        lines = (self.root / "etc/passwd").read_text().splitlines()
        (entry,) = (line.split(":") for line in lines if line.startswith(f"{name}:"))
        groups = [line.split(":") for line in (self.root / "etc/group").read_text().splitlines()]
        own = [group[2] for group in groups if name in group[3].split(",")]
        return int(entry[2]), int(entry[3]), ",".join([entry[3], *own]), entry[5]

    def gid(self, name: str) -> int:
        found = re.search(rf"^{name}:[^:]*:(\d+)", (self.root / "etc/group").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """With /proc, /sys and /dev, as in a container."""
        done = []
        try:
            for kind in ("proc", "sys", "dev"):
                subprocess.run(["mount", "--bind", f"/{kind}", self.root / kind], check=True)
                done.append(kind)
            yield
        finally:
            for kind in reversed(done):
                subprocess.run(["umount", "--lazy", self.root / kind], check=True)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("root", type=Path, help="aarch64 root file system; it is changed")
    words.add_argument("bench", type=Path, help="folder with student.onnx, split.json and cells")
    asked = words.parse_args()
    machine = Machine(asked.root.resolve())
    with machine.mounted():
        facts = "uname -m; . /etc/os-release; echo $PRETTY_NAME; ldd --version | head -1; python3 --version"
        (python,) = re.findall(r"^Python (3\.\d+)", machine.sh(facts), re.MULTILINE)
        say(f"\n{emulator()}")
        changed = " with changes" if git("status", "--short", "--untracked-files=no") else ""
        say(f"\nedgekd at commit {git('rev-parse', '--short', 'HEAD')}{changed}")
        expected = predictions_here(asked.bench)
        pins = pins_of(python)
        page(machine, pins)
        if any(pin.startswith("12.") for pin in pins):
            say("\n## docs/Dockerfile.jetson")
            environment = dockerfile(machine)
            say("\n## The image with --user and XDG_CACHE_HOME, as docs/jetson.md runs it")
            use(machine, asked.bench, expected, user=str(STRANGER), **environment, XDG_CACHE_HOME="/bench/.cache")
        else:
            use(machine, asked.bench, expected, user="jetson", **VENV)
    say("\nEverything above ended as it must.")
    return 0


def dockerfile(machine: Machine) -> dict[str, str]:
    """Carry out its instructions, and return the environment that it sets."""
    for old in ("src", "opt/edgekd", "home/edgekd"):
        shutil.rmtree(machine.root / old, ignore_errors=True)
    if re.search(r"^edgekd:", (machine.root / "etc/passwd").read_text(), re.MULTILINE):
        machine.sh("userdel edgekd")
    arguments: dict[str, str] = {}
    environment: dict[str, str] = {}
    user, where = "root", "/"
    for word, rest in instructions(DOCKERFILE.read_text()):
        if word == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif word == "ENV":
            key, _, value = rest.partition("=")
            environment[key] = value.replace("${PATH}", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        elif word == "COPY":
            copy(machine.root, *rest.split())
        elif word == "WORKDIR":
            where = rest
        elif word == "USER":
            user = rest
        elif word == "RUN" and "tensorrt" in rest:
            try:
                machine.sh(rest, user=user, where=where, **environment, **arguments)
            except Failed:
                say("    there is no TensorRT here: this step had to fail, and did")
            else:
                raise Failed("found a TensorRT where there is none")
        elif word == "RUN":
            machine.sh(rest, user=user, where=where, **environment, **arguments)
        elif word not in ("FROM", "ENTRYPOINT", "CMD"):
            raise Failed(f"{word} is not known here")
    machine.sh("edgekd doctor", user=user, where=where, **environment)
    names(machine, "edgekd", environment)
    return environment


def page(machine: Machine, pins: list[str]) -> None:
    """Carry out the section on installing as an ordinary user, with the last pin; then install the others."""
    say("\n## docs/jetson.md, section 3")
    block = section_3()
    if not re.search(r"^jetson:", (machine.root / "etc/passwd").read_text(), re.MULTILINE):
        machine.sh("useradd --create-home --groups video jetson")
    home = machine.root / "home/jetson"
    for old in ("edgekd", "edgekd-venv"):
        shutil.rmtree(home / old, ignore_errors=True)
    (home / "edgekd").mkdir()
    archive = subprocess.run(["git", "-C", REPO, "archive", "HEAD"], stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", home / "edgekd"], input=archive, check=True)
    machine.sh("chown -R jetson:jetson /home/jetson")
    last, *others = reversed(pins)
    block = re.sub(r"cuda-python==\S+?\*", f"cuda-python=={last}", block)
    block = re.sub(r"^git clone \S+ edgekd && ", "", block, flags=re.MULTILINE)
    machine.sh(block, user="jetson", where="~")
    names(machine, "jetson", VENV)
    for pin in others:
        machine.sh(f"pip install 'cuda-python=={pin}'", user="jetson", **VENV)
        names(machine, "jetson", VENV)


def use(machine: Machine, bench: Path, expected: Tables, *, user: str, **environment: str) -> None:
    """Compile with ONNX Runtime and predict there; compare with this machine."""
    inside = machine.root / "bench"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    for name in ("student.onnx", "split.json"):
        shutil.copy(bench / name, inside)
    shutil.copytree(bench / "cells", inside / "cells")
    uid, gid, *_ = machine.user(user)
    subprocess.run(["chown", "-R", f"{uid}:{gid}", inside], check=True)
    for recipe in TOLERANCE:
        for command in commands(recipe):
            machine.sh(command, user=user, where="/bench", **environment)
        compare(recipe, expected[recipe], read(inside / f"{recipe}.csv"))


def commands(recipe: str) -> list[str]:
    """The same on this machine and in the emulator."""
    engine, data = f"{recipe}.engine", "--data cells --split split.json"
    loose = "--set max_accuracy_drop=10"  # of so few images, one is more than the default
    return [
        f"edgekd compile student.onnx --backend onnxruntime --recipe {recipe} {data} {loose} --out {engine}",
        f"edgekd predict {engine} cells --strategy full --probabilities --threads 1 --out {recipe}.csv",
    ]


def predictions_here(bench: Path) -> Tables:
    """Run the commands on this machine."""
    say("\n## This machine, for comparison")
    found = {}
    for recipe in TOLERANCE:
        shutil.rmtree(bench / f"{recipe}.engine", ignore_errors=True)
        (bench / f"{recipe}.csv").unlink(missing_ok=True)
        for command in commands(recipe):
            say(f"\n$ {command}")
            subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=bench, check=True, capture_output=True)
        found[recipe] = read(bench / f"{recipe}.csv")
    return found


def compare(recipe: str, here: Table, there: Table) -> None:
    """Hold the predictions of the emulator against those of this machine.

    Raises:
        Failed: A probability is further off than TOLERANCE says, or an image is missing.
    """
    columns = list(here[0])[list(here[0]).index("error") + 1 :]
    if [(row["file"], row["error"]) for row in here] != [(row["file"], "") for row in there]:
        raise Failed("other images were classified")
    apart = max(abs(float(a[c]) - float(b[c])) for a, b in zip(here, there) for c in columns)
    same = sum(a["label"] == b["label"] for a, b in zip(here, there))
    say(f"    {recipe}: {len(here)} images: {same} labels as on this machine, probabilities at most {apart:.2g} apart")
    if apart > TOLERANCE[recipe]:
        raise Failed(f"{recipe} may be {TOLERANCE[recipe]} apart")


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's, each a word and the rest, without comments and line breaks."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    found = [line.partition(" ") for line in lines if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in found]


def copy(root: Path, *words: str) -> None:
    """COPY: files into a folder, a folder's contents into a folder."""
    say(f"\n$ COPY {' '.join(words)}")
    *sources, target = words
    into = root / target.lstrip("/")
    into.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if (REPO / source).is_dir():
            shutil.copytree(REPO / source, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / source, into)


def names(machine: Machine, user: str, environment: dict[str, str]) -> None:
    """Import the CUDA bindings, which load no library before they are called, and look up what edgekd calls."""
    show = "python: look up the names of the CUDA runtime that edgekd uses (device_exit is --device-side-exit alone)"
    machine.sh(f"python -c {shlex.quote(NAMES)}", user=user, show=show, **environment)


def pins_of(python: str) -> list[str]:
    """`12.6.*` and so on: the pins of the page's table for the JetPacks with this Python, each once."""
    rows = [line for line in PAGE.read_text().splitlines() if re.search(rf"^\|.*, {re.escape(python)} \|", line)]
    pins = dict.fromkeys(pin for row in rows for pin in re.findall(r"cuda-python==(\d+\.\d+\.\*)", row))
    if not pins:
        raise Failed(f"the table has no JetPack with Python {python}")
    return list(pins)


def section_3() -> str:
    """The shell block of the section on installing."""
    (block,) = re.findall(r"^## 3\..*?^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


def emulator() -> str:
    """The version of the QEMU that runs aarch64 programs."""
    entry = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").read_text()
    (program,) = re.findall(r"^interpreter (\S+)", entry, re.MULTILINE)
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def read(path: Path) -> Table:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", REPO, *words], capture_output=True, text=True, check=True).stdout.strip()


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failed:
        sys.exit(f"FAILED: {failed}")
