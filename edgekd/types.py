"""Type aliases shared by several packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
"""Images, logits, probabilities and other float32 tensors."""
Labels: TypeAlias = npt.NDArray[np.int64]
"""Class indices (N,)."""
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of items done and their total."""
