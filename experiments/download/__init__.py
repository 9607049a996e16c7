"""Get the public files behind the training data: recipes, downloads, checksums and archives."""
