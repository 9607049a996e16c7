"""Benchmarks. Each reports ratios to a baseline from the same run, because absolute numbers depend on the machine."""
