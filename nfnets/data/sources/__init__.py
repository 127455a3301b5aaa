"""Records by number: TFDS datasets, image folders, built-in images. Knows nothing of batches."""
