"""Which record stands where in which batch, and the threads that decode it."""
