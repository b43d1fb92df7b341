"""Mechanistic interpretability of masked diffusion language models."""
