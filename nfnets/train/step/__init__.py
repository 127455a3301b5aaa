"""The compiled step: state, loss, gradients, update. Knows nothing of files, logs or where images come from."""
