"""Measuring a bundle: perplexity, speed and memory."""
