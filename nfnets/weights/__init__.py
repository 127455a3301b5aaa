"""Weights as files: what they hold beside the arrays, and how a network takes them. Knows nothing of training or photographs."""
