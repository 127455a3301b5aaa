"""One step, one loop, on any number of devices and processes: from a configuration and a workdir to a trained network."""
