"""Encoders of documents into vectors, all with forward(input_ids, attention_mask, task) -> (B, D)."""
