"""Evaluation results: made, written, read, shown and compared."""
