"""In one process, many moments: so many milliseconds after reading begins, or after its first batch, Ctrl-C comes.

The whole group hears it.

`python moments.py FOLDER TIMES MS`; at the end it prints how many batches came.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Item
from edgekd.errors import EdgekdError
from edgekd.training.dataset import EpochSampler, ImageSet
from edgekd.training.loader import Loader


def main(folder: Path, times: int, ms: float) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    items = [Item(p.name, 0) for p in sorted(folder.iterdir())] * 4
    images = ImageSet(items, data=folder, preprocess=Preprocess(16))
    batches = 0
    for k in range(times):
        try:
            ctrl_c = threading.Timer(k // 2 * ms / 1000, os.killpg, (0, signal.SIGINT))
            if k % 2:
                ctrl_c.start()
            reading = Loader(images, batch_size=4, sampler=EpochSampler(len(items)), workers=2)
            while True:
                for _ in reading:
                    batches += 1
                    if not ctrl_c.ident:
                        ctrl_c.start()
        except KeyboardInterrupt:
            reading = None  # its processes end
        except EdgekdError as error:
            print(error)
            os._exit(1)  # the timer would interrupt nobody's work
    print(batches, "batches")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
