"""Checkpoints of other code bases."""
