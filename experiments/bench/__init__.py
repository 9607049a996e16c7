"""Benchmarks. Each reports ratios to a named baseline from the same run. Not tests: numbers depend on the machine."""
