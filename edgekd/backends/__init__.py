"""Backends: what compiles and runs a graph on a device."""
