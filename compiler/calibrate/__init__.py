"""Calibration: text for the model to read, and statistics of what flows through it meanwhile."""
