"""Bytes: TFRecord shards and their index, tf.Examples, disks and buckets. Knows nothing of images."""
