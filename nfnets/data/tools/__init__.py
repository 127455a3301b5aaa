"""The work of `launch.data`: describes a dataset, checks it, and writes it with smaller images."""
