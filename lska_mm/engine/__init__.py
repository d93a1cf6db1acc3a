"""Hooks, an optimizer constructor and CPU processes, for configs to use in training."""
