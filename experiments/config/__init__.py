"""What an experiment is made of: every key, where its value comes from, and what it may be."""
