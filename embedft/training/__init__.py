"""What both trainers share: settings for transformers' Trainer, progress, exact resume, measures, publication.

Knows neither pairs nor prompts: an example reaches this room only as a batch inside a Trainer.
"""
