"""Encoders that turn documents into vectors. All have forward(input_ids, attention_mask, task) -> (B, D)."""
