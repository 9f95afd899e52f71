"""seed-lm: the project's own small causal LM, and the script that makes it."""
