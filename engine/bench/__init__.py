"""Measurements: tokens per second by prompt, depth and batch; seconds by instruction."""
