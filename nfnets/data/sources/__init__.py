"""Records by number: TFDS datasets, image folders, built-in images. Batches are not known here."""
