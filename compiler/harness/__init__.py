"""Tasks of lm-evaluation-harness: their examples, the model that it asks, and what is made of the answers."""
