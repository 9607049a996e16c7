"""A run: its folder, its log, who else works in it, and how it ends."""
