"""Conformance tests for implementations of edgekd's interfaces, without a test framework."""

from edgekd.testing.conformance import ConformanceError, check_backend
from edgekd.testing.students import small_student

__all__ = ["ConformanceError", "check_backend", "small_student"]
