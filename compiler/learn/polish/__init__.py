"""The flattened model as a whole, learning to make up for what was rounded."""
