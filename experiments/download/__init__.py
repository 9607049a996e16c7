"""Training data from public files."""
