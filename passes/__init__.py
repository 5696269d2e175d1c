"""ONNX graph passes of planish, one per file, and the Scheme and Plan they read."""
