"""Distillation methods, one a file; `edgekd.distill.methods` finds them by name and `criterion` sums them."""
