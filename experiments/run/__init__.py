"""A run: its folder, lock, loggers and exit status; and the trials of a sweep."""
