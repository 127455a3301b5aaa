"""Starts a training run on a cluster, with one file for each engine; docs/pods.md has the command for each."""
