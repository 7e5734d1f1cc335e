"""What benchmarks/stream.py races: the same samples in each system's own files, and an epoch of them by each system."""
