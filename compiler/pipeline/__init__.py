"""Compiling: the recipe, the stages in order, and the records they leave."""
