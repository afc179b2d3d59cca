"""Measuring a compiled engine: accuracy, latency, memory and energy; the record, and the views of it."""
