"""Commands that are killed or stopped in the middle, and what is left of their files.

python tests/faults/kills.py --base BASE [--count 300] [--seed 0] [--commands compile,tune,…] [--renames]

BASE is a folder of `base.py`. A command runs in a fork of a process that has everything imported, so a try takes as
long as the work alone. It is ended at one of the file-system events that it causes (`sys.addaudithook`), or at a random
moment, mostly by SIGKILL. Then what was there before must be as it was, or wholly the new one, and what its reader
takes must be one of the two; the next run of the command must end well and leave nothing lying about but its output.
The summary is printed as JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgekd import signals
from edgekd.errors import EdgekdError

TINY = ["--set", "workers=0", "--set", "batch_size=16", "--set", "precision=32-true"]
COMPILE = ["compile", "student.onnx", "--backend", "onnxruntime", "--set", "batch_sizes=[1]", "--out", "student.engine"]
IMAGES = ["--data", "cells", "--split", "run/split.json"]
COMMANDS = {
    "compile": COMPILE,
    "compile-int8": [*COMPILE, "--recipe", "int8", *IMAGES, "--set", "max_accuracy_drop=100"],
    "compile-moved": COMPILE,  # as on file systems that cannot exchange two names
    "tune": ["tune", "student.engine", *IMAGES, "--latency-ms", "100", "--keep-exits"],
    "export": ["export", "run", "--data", "cells", "--out", "student.onnx"],
    "evaluate": ["evaluate", "student.engine", *IMAGES, "--out", "measures.json", "--plot", "confusion.png"],
    "train": ["train", "--data", "cells", "--model", "multi-exit-test_resnet", "--protocol", "demo", "--weights",
              "none", "--epochs", "2", "--image-size", "32", *TINY, "--out", "new", "--resume"],
    "bench": ["bench", "student.engine", *IMAGES, "--suite", "tiny.toml", "--set", 'variants=["cascade"]',
              "--no-report", "--out", "new.json"],
    "data": ["data", "synthetic", "--count", "40", "--size", "16", "--out", "drawn"],
}  # fmt: skip
EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "ctypes.dlsym"}
RENAMES = {"os.rename", "os.rmdir", "ctypes.dlsym"}
"""Where what is there changes its name; `ctypes.dlsym` is the exchange of two folders, just before it happens."""
SIGNALS = [signal.SIGKILL] * 7 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


WARM = [
    *("edgekd.bench.report", "edgekd.bench.measure", "edgekd.cli", "edgekd.export", "edgekd.quantization.cpu"),
    *("edgekd.runtime.classifier", "edgekd.runtime.tuning", "edgekd.training.train", "matplotlib.figure"),
    *("onnxruntime.quantization", "torch.utils.tensorboard"),
]


def warm() -> None:
    """Import what the commands import, with one thread: a fork has no others."""
    import torch

    torch.set_num_threads(1)
    for module in WARM:
        importlib.import_module(module)


def start(name: str, folder: Path, hook: Callable[[str], None] | None, log: Path) -> int:
    """Run a command in a fork, in `folder` and with its TMPDIR there; `hook` is told its file-system events."""
    if pid := os.fork():
        return pid
    signals.heed(ignored=True)  # as the command does first; whoever runs this in the background has some ignored
    os.setsid()
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
    for number, target in ((1, os.devnull), (2, log)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    code = 70
    try:
        from edgekd import files
        from edgekd.cli.main import app

        if name.endswith("-moved"):
            files._exchange = lambda one, other: False
        if hook:
            sys.addaudithook(lambda event, args: hook(event) if _is_ours(event, args, folder) else None)
        app(COMMANDS[name], prog_name="edgekd")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def _is_ours(event: str, args: tuple[object, ...], folder: Path) -> bool:
    """Whether it is an event in the folder after which the disk may differ."""
    if event == "ctypes.dlsym":
        return args[1] == "renameat2"
    writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    if not (writes or event in EVENTS) or not isinstance(args[0], (str, bytes, os.PathLike)):
        return False
    return os.path.join(os.getcwd(), os.fsdecode(args[0])).startswith(str(folder))  # noqa: PTH109, PTH118


def wait(pid: int, limit: float = 120) -> int:
    """Exit code; negative for a signal, -SIGKILL after the limit."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise SystemExit(f"process {pid} hangs")


def tree(folder: Path) -> dict[str, str]:
    """Relative path to digest of every file, but what belongs to no output."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink())
    names = ((p, str(p.relative_to(folder))) for p in files)
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for p, n in names if "tensorboard" not in n}


def outputs(files: dict[str, str]) -> dict[str, dict[str, str]]:
    """Files by what they are part of: the first word of their path; hidden ones are not yet, or no longer, anything."""
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name, digest in files.items():
        if not any(part.startswith(".") for part in name.split("/")):
            found[name.split("/")[0]][name] = digest
    return found


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    """What reads each output."""
    from edgekd.artifacts.manifest import read_manifest
    from edgekd.artifacts.metadata import read_onnx
    from edgekd.bench.record import read_record
    from edgekd.data.folders import check, scan
    from edgekd.data.split import read_split
    from edgekd.training import run_folder, sweep

    return {
        "student.engine": lambda: read_manifest(folder / "student.engine"),
        "student.onnx": lambda: read_onnx(folder / "student.onnx"),
        "measures.json": lambda: sweep.scores(folder / "measures.json"),
        "new.json": lambda: read_record(folder / "new.json"),
        "new/split.json": lambda: read_split(folder / "new"),
        "new/model.safetensors": lambda: run_folder.load_model(folder / "new"),
        "drawn": lambda: check(scan(folder / "drawn")),
    }


def refusals(folder: Path) -> dict[str, str]:
    """Outputs that are there and that their reader does not take, and why.

    Each is read even where nothing is there: readers put back what was moved aside.
    """
    found = {}
    for name, read in readers(folder).items():
        try:
            read()
        except Exception as error:
            if (folder / name).exists() or not isinstance(error, (EdgekdError, FileNotFoundError)):
                found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


class Tries:
    """Ends one command again and again, and counts what is wrong afterwards."""

    def __init__(self, name: str, base: Path, top: Path, *, renames: bool) -> None:
        self.name, self.base, self.folder, self.log = name, base, top / "work", top / "stderr"
        self.renames = renames
        self.found: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.before = outputs(self._fresh())
        counter, seen = top / "events", [0]

        def count(event: str) -> None:
            if not renames or event in RENAMES:
                seen[0] += 1
                os.pwrite(handle, b"%9d" % seen[0], 0)

        handle = os.open(counter, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        began = time.monotonic()
        code = wait(start(name, self.folder, count, self.log))
        self.seconds = time.monotonic() - began
        assert code == 0, f"{name} alone ends with {code}: {self.log.read_text()[-400:]}"
        self.events = int(os.pread(handle, 9, 0) or 0)
        os.close(handle)
        self.whole = outputs(tree(self.folder))
        self.left = set(tree(self.folder))

    def _fresh(self) -> dict[str, str]:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.base, self.folder, ignore=shutil.ignore_patterns("cells"))
        (self.folder / "cells").symlink_to(self.base / "cells")
        (self.folder / "tmp").mkdir()
        return tree(self.folder)

    def end(self, sig: signal.Signals, *, event: int | None = None, after_s: float = 0.0) -> None:
        """End it just before its nth event, or at a moment, and look."""
        self._fresh()
        self.log.write_text("")
        left = [event]

        def hook(event: str) -> None:
            if not self.renames or event in RENAMES:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), sig)

        pid = start(self.name, self.folder, hook if event else None, self.log)
        if not event:
            time.sleep(after_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)
        code = wait(pid)
        at = f"{self.name}, {sig.name} at {f'event {event}' if event else f'{after_s:.2f} s'}"
        self.found["kills"] += 1
        if code not in ({-sig, 0} if sig == signal.SIGKILL else {128 + sig, 0}):
            self._count("wrong exit codes", f"{at}: {code}")
        self._look(at)
        self._run_again(at)

    def _look(self, at: str) -> None:
        """Whether each output is the old or the new one, and its reader takes it."""
        refused = refusals(self.folder)
        now = outputs(tree(self.folder))
        for name, reason in refused.items():
            self._count("damaged", f"{at}: {name}: {reason}")
        for name in self.before.keys() - now.keys():
            self._count("lost", f"{at}: {name} is gone")
        for name, files in now.items():
            whole = files == self.before.get(name) or files.keys() == self.whole.get(name, {}).keys()
            if not whole and name != "new":  # a run folder grows file by file
                self._count("wrong accepts", f"{at}: {name} is neither the old nor the new one")
        if "Traceback" in (said := self.log.read_text()):
            self._count("tracebacks", f"{at}: {said[-300:]}")

    def _run_again(self, at: str) -> None:
        (self.folder / "new.json").unlink(missing_ok=True)  # a record, or a data set, that is there is refused
        shutil.rmtree(self.folder / "drawn", ignore_errors=True)
        code = wait(start(self.name, self.folder, None, self.log))
        if code:
            self._count("next runs that fail", f"{at}: exit code {code}: {self.log.read_text()[-300:]}")
        for name, reason in refusals(self.folder).items():
            self._count("damaged", f"{at}, after the next run: {name}: {reason}")
        if litter := tree(self.folder).keys() - self.left:
            self._count("litter after the next run", f"{at}: {sorted(litter)[:3]}")

    def _count(self, kind: str, what: str) -> None:
        self.found[kind] += 1
        self.problems.append(f"{kind}: {what}")


KINDS = ("lost", "damaged", "wrong accepts", "tracebacks", "wrong exit codes", "next runs that fail")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300, help="how many kills, spread over the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--renames", action="store_true", help="SIGKILL at each change of a name instead, once")
    given = parser.parse_args()
    warm()
    chance, names = random.Random(given.seed), given.commands.split(",")
    found, problems = collections.Counter(dict.fromkeys((*KINDS, "litter after the next run"), 0)), []
    for number, name in enumerate(names):
        with tempfile.TemporaryDirectory() as top:
            tries = Tries(name, given.base.resolve(), Path(top).resolve(), renames=given.renames)
            if given.renames:
                for event in range(1, tries.events + 1):
                    tries.end(signal.SIGKILL, event=event)
            else:
                for _ in range(given.count * (number + 1) // len(names) - given.count * number // len(names)):
                    sig = chance.choice(SIGNALS)
                    if chance.random() < 0.7:
                        tries.end(sig, event=chance.randint(1, tries.events))
                    else:
                        tries.end(sig, after_s=chance.uniform(0, tries.seconds))
        print(f"{name}: {dict(tries.found)}, {tries.events} events, {tries.seconds:.1f} s", file=sys.stderr, flush=True)
        found += tries.found
        problems += tries.problems
    counts = {kind: found[kind] for kind in ("kills", *KINDS, "litter after the next run")}
    print(json.dumps({**counts, "problems": problems}, indent=1))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
