"""The report of a run: one HTML file, in which every figure names the file it comes from."""
