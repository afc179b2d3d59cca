"""Protocols, the training loop, run folders and evaluation of networks in torch."""
