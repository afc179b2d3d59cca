"""Runs training jobs in child processes, several at a time: through Ray if it is installed, else locally.

The child is `python -m edgekd.cli.job JSON`. It exits when its parent dies, so a restart never runs a job twice.
"""

from __future__ import annotations

import dataclasses
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
from edgekd.training.request import Request

JobState = Literal["done", "failed", "skipped"]


@dataclass(frozen=True)
class ChildJob:
    """Requests that one child process carries out in turn, up to the first that fails.

    Attributes:
        name: Name of the job.
        requests: What to train and evaluate.
        log: File that the child's output is appended to.
        depends_on: Names of the jobs that must finish first.
    """

    name: str
    requests: tuple[Request, ...]
    log: Path
    depends_on: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the requests as the JSON that the child process reads."""
        return json.dumps({"requests": [dataclasses.asdict(request) for request in self.requests]}, default=str)


def run_jobs(
    jobs: Sequence[ChildJob],
    *,
    at_once: int = 1,
    deadline: float = float("inf"),
    on_end: Callable[[ChildJob, JobState], None] | None = None,
) -> dict[str, JobState]:
    """Run the jobs in order, `at_once` at a time; when interrupted, stop all that are running.

    Args:
        jobs: The jobs; a dependency outside of them counts as done.
        at_once: Number of child processes.
        deadline: Time on `time.monotonic` after which no job is started.
        on_end: Called with each job that ended and its state.

    Returns:
        Job name to state; `skipped` if a dependency failed or the deadline came first.
    """
    states: dict[str, JobState] = {}
    names = {job.name for job in jobs}
    pending, running = list(jobs), dict[Future[int], ChildJob]()
    executor: _Executor = _RayCluster(at_once) if at_once > 1 and find_spec("ray") else _LocalProcesses(at_once)
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while pending or running:
                ready = [job for job in pending if _is_ready(job, names, states)] if time.monotonic() < deadline else []
                for job in ready[: at_once - len(running)]:
                    pending.remove(job)
                    running[pool.submit(executor.run, job)] = job
                if not running:  # the deadline has passed, or every job left depends on one that failed
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    states[job.name] = "failed" if future.result() else "done"
                    if on_end:
                        on_end(job, states[job.name])
        finally:
            executor.stop()
    return states | {job.name: "skipped" for job in pending}


def _is_ready(job: ChildJob, names: Collection[str], states: dict[str, JobState]) -> bool:
    return all(states.get(name) == "done" for name in job.depends_on if name in names)


class _Executor(Protocol):
    def run(self, job: ChildJob) -> int:
        """Run one job to its end and return its exit code."""

    def stop(self) -> None:
        """Stop the jobs that are running."""


class _LocalProcesses:
    """Child processes of this one, with an equal share of its processors and one of its GPUs each."""

    def __init__(self, at_once: int) -> None:
        threads = {"OMP_NUM_THREADS": str(max(1, default_threads() // at_once))} if at_once > 1 else {}
        self.env = threads | os.environ
        self.gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        import torch  # not above: the child imports this module before it handles signals, and torch takes seconds

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = list(map(str, range(torch.cuda.device_count()))) if named is None else named.split(",")
        for slot in range(at_once):
            self.gpus.put(gpus[slot % len(gpus)] if gpus else "")
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, job: ChildJob) -> int:
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


class _RayCluster:
    """Workers of the Ray cluster at RAY_ADDRESS, else of a local one; run folders must be on a shared file system."""

    def __init__(self, at_once: int) -> None:
        import ray

        self.ray: Any = ray
        ray.init(log_to_driver=False, ignore_reinit_error=True)
        have = ray.cluster_resources()
        cpus, gpus = max(1, int(have["CPU"]) // at_once), min(1.0, have.get("GPU", 0) / at_once)
        self.remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_process)

    def run(self, job: ChildJob) -> int:
        try:
            return int(self.ray.get(self.remote.remote(job)))
        except self.ray.exceptions.RayError as error:
            with job.log.open("a") as log:
                log.write(f"Ray: {error}\n")
            return 1

    def stop(self) -> None:
        self.ray.shutdown()


def _process(
    job: ChildJob,
    env: dict[str, str] | None = None,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda p: None,
) -> int:
    """Run one job in a child process that exits when its standard input is closed."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = start_child("edgekd.cli.job", job.to_json(), stdout=log, stderr=subprocess.STDOUT, env=env)
        started(process)
        return process.wait()


def failure_reason(log: Path) -> str:
    """Return the last error in a failed job's log, else the log's last line."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"it was killed, and {log} is empty"])[-1]
