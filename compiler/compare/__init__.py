"""Bundles and checkpoints side by side: size, accuracy and speed on the same text in one run."""
