"""Kernels and numerical operations: each a ladder of implementations over a plain reference."""
