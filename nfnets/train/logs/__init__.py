"""What a run writes down for people. Knows nothing of the step."""
