"""Answers from an engine: pre-processing, the decision to leave early, and the classifier that joins them."""
