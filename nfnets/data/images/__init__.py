"""Pixels: decodes, crops, augments and mixes single images. Where they come from is not known here."""
