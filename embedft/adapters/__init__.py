"""What makes an adapter trustworthy: its passport, its probes, and the store that never changes an adapter's content."""
