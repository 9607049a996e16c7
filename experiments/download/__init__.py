"""Public files that training data are built from: recipes, downloads, checksums and archives."""
