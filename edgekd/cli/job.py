"""The child process of a sweep: carries out the requests of one job and exits when its parent dies."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from edgekd import signals
from edgekd.child import end_with_parent
from edgekd.schema import from_dict
from edgekd.training.request import Request, TrainRequest


@dataclass(frozen=True)
class _Job:
    requests: tuple[Request, ...]


def main(text: str) -> None:
    """Carry out the requests in turn, up to the first that fails.

    Args:
        text: The job as `ChildJob.to_json` writes it.
    """
    signals.heed(ignored=True)
    end_with_parent()
    from edgekd.cli.main import log_to_stderr, reporting_errors  # heavy: after the signals are handled

    log_to_stderr()
    for request in requests_of(text):
        with reporting_errors():
            _carry_out(request)
            sys.stdout.flush()


def requests_of(text: str) -> tuple[Request, ...]:
    """Return the requests that `ChildJob.to_json` wrote."""
    return from_dict(_Job, json.loads(text), where="job").requests


def _carry_out(request: Request) -> None:
    from edgekd.cli.evaluate import evaluate
    from edgekd.cli.train import run_training

    if isinstance(request, TrainRequest):
        run_training(request)
    else:
        evaluate(request.run, data=request.data, out=request.out, svm=request.svm)


if __name__ == "__main__":
    main(sys.argv[1])
