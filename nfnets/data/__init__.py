"""Images on their way to the device: records → uint8 batches that are a function of (seed, step). Training is not known here."""
