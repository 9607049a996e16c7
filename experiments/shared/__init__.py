"""Console, files and progress: what all commands use."""
