"""Running an engine: opening it, early-exit classification, threshold tuning, diagnosis."""
