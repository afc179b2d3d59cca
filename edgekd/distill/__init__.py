"""Distillation methods by name; several are joined with `+`, for example `kd+at`."""

# each registers itself
from edgekd.distill import ab, at, byot, ce, crd, fitnets, hybrid, kd, multipart, pkt, rkd, scan, sd, sskd, vid  # noqa: F401
