"""Hard negatives: propose candidates, filter and sample them, and report on the result."""
