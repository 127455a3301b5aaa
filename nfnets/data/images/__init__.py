"""Pixels: decoding, cropping, augmenting, mixing of single images. Knows nothing of where they come from."""
