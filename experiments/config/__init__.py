"""Configuration of experiments: all keys, the files that set them, and the values they may have."""
