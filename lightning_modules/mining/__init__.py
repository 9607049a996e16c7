"""Hard negatives: ranked, filtered, sampled and reported."""
