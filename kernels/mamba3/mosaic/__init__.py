"""Mosaic GPU kernels for Hopper, written in Pallas."""
