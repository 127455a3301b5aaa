"""One file a cluster engine; docs/pods.md has the command for each."""
