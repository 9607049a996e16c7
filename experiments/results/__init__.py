"""Evaluation results: compute, store, show and compare them."""
