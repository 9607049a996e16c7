"""What was run: configurations, and one entry point a file."""
