"""Adapters for causal language models: rows, templates, training, evaluation. Knows nothing of embeddings or of serving."""
