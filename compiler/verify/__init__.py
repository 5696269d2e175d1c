"""The PyTorch oracle, and the comparison of a compiled model with it."""
