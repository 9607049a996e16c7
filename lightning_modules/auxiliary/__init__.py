"""Losses that are added to InfoNCE, one file each."""
