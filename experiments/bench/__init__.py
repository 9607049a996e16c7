"""Timings, always as a ratio in one run against something named. Not tests: numbers depend on the machine."""
