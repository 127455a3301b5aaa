"""What `launch.data` does: looking at a dataset, checking it, writing it smaller."""
