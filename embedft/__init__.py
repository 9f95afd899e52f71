"""embedft: train small adapters, prove that each helps, serve many over one frozen base. Importing it imports no torch."""

__version__ = "0.1.0"
