"""Images on their way to the device: sources of uint8 images and labels, and batches that are a function of the step."""
