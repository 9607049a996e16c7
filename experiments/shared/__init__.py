"""Console, output folders, and progress: what all commands use."""
