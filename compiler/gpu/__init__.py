"""Decoding on a GPU with the CUDA kernels, from a bundle and from Python."""
