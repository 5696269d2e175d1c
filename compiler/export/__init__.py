"""From a checkpoint to ONNX graphs: the float model, and the portable low-bit model made of it by the passes."""
