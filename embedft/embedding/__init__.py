"""Retrieval models: examples, batches, losses, training and evaluation. Never imports causal_lm."""
