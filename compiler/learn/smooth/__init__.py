"""Smooth rotation at ffn_out: channel scales in front of a rotation (arXiv 2606.09927 and SmoothRot)."""
