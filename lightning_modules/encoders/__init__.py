"""Encoders: modules with forward(input_ids, attention_mask, task) -> vectors (B, D)."""
