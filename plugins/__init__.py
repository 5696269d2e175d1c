"""The planish ops: what they mean, how their codes are packed, and the kernels that run them."""
