"""A bundle: the folder a compile leaves, its manifest, and what is in it."""
