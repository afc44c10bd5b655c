"""Benchmarks: the backends against each other, against peers, and against the machine."""
