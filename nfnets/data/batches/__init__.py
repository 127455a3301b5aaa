"""Which record is in which row of which batch, and the threads that decode it."""
