"""Build objects from a configuration."""
