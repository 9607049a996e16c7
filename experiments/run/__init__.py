"""Run one training (folder, lock, loggers, exit status), or the trials of a sweep."""
