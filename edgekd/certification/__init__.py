"""Certification of early exit: statistical tests of a promise on images that chose nothing."""
