"""Encoders: modules with forward(tokens, task) -> vectors (B, D)."""
