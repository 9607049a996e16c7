"""Embed texts, search them, and measure the result."""
