"""The low-bit arithmetic, and the codes of a checkpoint on disk."""
