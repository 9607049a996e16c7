"""The loss of every path, and what its options bring."""
