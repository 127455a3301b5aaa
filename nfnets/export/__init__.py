"""Trained networks as plain programs for whatever runs them: folded, as StableHLO, as ONNX. Knows nothing of training or data."""
