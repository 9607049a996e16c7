"""Sweeps: their files, the values of their trials, and the controller that runs them on one machine."""
