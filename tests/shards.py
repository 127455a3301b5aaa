"""Small TFRecord datasets as TFDS lays them out, written without TensorFlow."""

import json
import struct

from nfnets.data.storage import tfrecord


def varint(value: int) -> bytes:
  value &= 2**64 - 1
  data = b""
  while value > 127:
    data, value = data + bytes([value & 127 | 128]), value >> 7
  return data + bytes([value])


def field(number: int, content: bytes) -> bytes:
  return varint(number << 3 | 2) + varint(len(content)) + content


def example(packed: bool = True, **features) -> bytes:
  """A serialized tf.Example of lists of bytes or integers."""
  entries = b""
  for key, values in features.items():
    values = values if isinstance(values, list) else [values]
    if values and isinstance(values[0], bytes):
      feature = field(1, b"".join(field(1, value) for value in values))
    elif packed:
      feature = field(3, field(1, b"".join(map(varint, values))))
    else:
      feature = field(3, b"".join(varint(1 << 3) + varint(value) for value in values))
    entries += field(1, field(1, key.encode()) + field(2, feature))
  return field(1, entries)


def framed(payload: bytes) -> bytes:
  length = struct.pack("<Q", len(payload))
  return length + struct.pack("<I", tfrecord.masked_crc(length)) + payload + struct.pack("<I", tfrecord.masked_crc(payload))


def write_shard(path, payloads) -> None:
  path.write_bytes(b"".join(map(framed, payloads)))


def write_metadata(directory, name: str, splits: dict[str, list[int]], *, classes: int, file_format: str = "tfrecord") -> None:
  """dataset_info.json, features.json and label.labels.txt. splits: the lengths of each one's shards."""
  directory.mkdir(parents=True)
  template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  (directory / "dataset_info.json").write_text(
    json.dumps(
      {
        "fileFormat": file_format,
        "moduleName": "tests",
        "name": name,
        "version": directory.name,
        "splits": [
          {"filepathTemplate": template, "name": split, "numBytes": "1", "shardLengths": [*map(str, lengths)]}
          for split, lengths in splits.items()
        ],
      }
    )
  )
  features = "tensorflow_datasets.core.features"
  shape = {"dimensions": ["-1", "-1", "3"]}
  (directory / "features.json").write_text(
    json.dumps(
      {
        "pythonClassName": f"{features}.features_dict.FeaturesDict",
        "featuresDict": {
          "features": {
            "file_name": {"pythonClassName": f"{features}.text_feature.Text", "text": {}},
            "image": {
              "pythonClassName": f"{features}.image_feature.Image",
              "image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape},
            },
            "label": {
              "pythonClassName": f"{features}.class_label_feature.ClassLabel",
              "classLabel": {"numClasses": str(classes)},
            },
          }
        },
      }
    )
  )
  (directory / "label.labels.txt").write_text("".join(f"class {i}\n" for i in range(classes)))


def write_dataset(root, splits: dict[str, list[int]], *, name: str = "pictures", classes: int = 5, version: str = "1.0.0"):
  """Returns the version directory. Record i of a split has the image image_of(split, i) and the label i mod classes."""
  directory = root / name / version
  write_metadata(directory, name, splits, classes=classes)
  for split, lengths in splits.items():
    number = 0
    for shard, length in enumerate(lengths):
      payloads = [example(file_name=b"x", image=image_of(split, i), label=i % classes) for i in range(number, number + length)]
      write_shard(directory / f"{name}-{split}.tfrecord-{shard:05d}-of-{len(lengths):05d}", payloads)
      number += length
  return directory


def image_of(split: str, number: int) -> bytes:
  return f"{split} {number} ".encode() + b"\xff\xd8" * (37 * number)
