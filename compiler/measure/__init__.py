"""Measuring a model: perplexity, divergence from the float model, speed and memory, and models side by side."""
