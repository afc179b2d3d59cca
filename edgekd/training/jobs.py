"""Many edgekd commands side by side, each job in a process of its own: through Ray if it is installed, else here.

`python -m edgekd.cli.job JSON` is that process. It exits when its parent dies, so a restart never runs a job twice.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from edgekd.child import start_child
from edgekd.host import default_threads

State = Literal["done", "failed", "left"]


@dataclass(frozen=True)
class Job:
    """edgekd commands (without the word `edgekd`) to run one after another. log: what they print, appended.

    after: names of the jobs that must be done before.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path
    after: tuple[str, ...] = ()


def launch(
    jobs: Sequence[Job],
    *,
    at_once: int = 1,
    deadline: float = float("inf"),
    on_end: Callable[[Job, State], None] | None = None,
) -> dict[str, State]:
    """Run the jobs, `at_once` of them at a time, early ones first; what became of each.

    A job that fails takes along only those that wait for it: they are `left`, as are those that were not begun by the
    deadline (on `time.monotonic`). When this is interrupted, all that is running is stopped.
    """
    states: dict[str, State] = {}
    ours = {job.name for job in jobs}
    waiting, running = list(jobs), dict[Future[int], Job]()
    runner: _Runner = _Ray(at_once) if at_once > 1 and find_spec("ray") else _Processes(at_once)
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                ready = [job for job in waiting if _ready(job, ours, states)] if time.monotonic() < deadline else []
                for job in ready[: at_once - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(runner.run, job)] = job
                if not running:  # out of time, or all that is left waits for what failed
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    states[job.name] = "failed" if future.result() else "done"
                    if on_end:
                        on_end(job, states[job.name])
        finally:
            runner.stop()
    return states | {job.name: "left" for job in waiting}


def _ready(job: Job, ours: Collection[str], states: dict[str, State]) -> bool:
    """Whether all that it waits for is done; what is none of ours was done before."""
    return all(states.get(name) == "done" for name in job.after if name in ours)


class _Runner(Protocol):
    def run(self, job: Job) -> int:
        """Run one job to its end; its exit code."""

    def stop(self) -> None:
        """End whatever is still running."""


class _Processes:
    """Processes of this machine, which share its processors; with several GPUs each has one of them."""

    def __init__(self, at_once: int) -> None:
        threads = {"OMP_NUM_THREADS": str(max(1, default_threads() // at_once))} if at_once > 1 else {}
        self.env = threads | os.environ
        self.gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        import torch  # not above: the process of a job would spend seconds in it before it heeds signals

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = list(map(str, range(torch.cuda.device_count()))) if named is None else named.split(",")
        for slot in range(at_once):
            self.gpus.put(gpus[slot % len(gpus)] if gpus else "")
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, job: Job) -> int:
        gpu = self.gpus.get()
        try:
            return _process(job, self.env | {"CUDA_VISIBLE_DEVICES": gpu}, self._started)
        finally:
            self.gpus.put(gpu)

    def _started(self, process: subprocess.Popen[bytes]) -> None:
        self.running.add(process)
        if self.stopped:
            self.stop()

    def stop(self) -> None:
        self.stopped = True
        for process in self.running:
            assert process.stdin is not None
            process.stdin.close()


class _Ray:
    """Workers of a Ray cluster (the one at RAY_ADDRESS, else one of this machine); run folders are on shared disks."""

    def __init__(self, at_once: int) -> None:
        import ray

        self.ray: Any = ray
        ray.init(log_to_driver=False, ignore_reinit_error=True)
        have = ray.cluster_resources()
        cpus, gpus = max(1, int(have["CPU"]) // at_once), min(1.0, have.get("GPU", 0) / at_once)
        self.remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_process)

    def run(self, job: Job) -> int:
        try:
            return int(self.ray.get(self.remote.remote(job)))
        except self.ray.exceptions.RayError as error:
            with job.log.open("a") as log:
                log.write(f"Ray: {error}\n")
            return 1

    def stop(self) -> None:
        self.ray.shutdown()


def _process(
    job: Job, env: dict[str, str] | None = None, started: Callable[[subprocess.Popen[bytes]], None] = lambda p: None
) -> int:
    """One job in a process whose standard input stays open for as long as it is wanted."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    words = json.dumps(job.commands)
    with job.log.open("ab") as log:
        process = start_child("edgekd.cli.job", words, stdout=log, stderr=subprocess.STDOUT, env=env)
        started(process)
        return process.wait()


def reason(log: Path) -> str:
    """Why a job failed: the last error in its log, else the log's last line."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"it was killed, and {log} is empty"])[-1]
