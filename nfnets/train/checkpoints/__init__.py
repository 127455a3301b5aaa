"""Saving and restoring the state, and what tells a good checkpoint from a damaged one. Knows nothing of the loop."""
