"""Bytes: TFRecord shards and their index, tf.Examples, disks and buckets. Images are not known here."""
