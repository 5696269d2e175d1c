"""Clips and codes: what rounding a weight or an activation costs, and how it costs less."""
