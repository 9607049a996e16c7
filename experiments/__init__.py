"""Experiments: one YAML file each, and the commands that train, evaluate and compare them."""
