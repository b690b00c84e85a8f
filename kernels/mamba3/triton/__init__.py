"""Triton kernels for NVIDIA GPUs, launched through jax-triton."""
