"""Calibration and Q/DQ placement for each target."""
