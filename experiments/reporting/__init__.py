"""The page that tells of a run: one HTML file, in which every figure names the file that it was read from."""
