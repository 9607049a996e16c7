"""Compute, store, show and compare evaluation results."""
