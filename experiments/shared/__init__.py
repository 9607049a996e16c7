"""Helpers that all commands use: console, output folders, and progress."""
