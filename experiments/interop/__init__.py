"""Encoders in the hands of other programs."""
