"""Measures that work on any network; they know nothing of experiments."""
