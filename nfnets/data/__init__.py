"""Images on their way to the device: records → uint8 batches that are a function of (seed, step). Training is not known here."""

import importlib.util

if missing := [name for name in ("PIL", "cv2", "google_crc32c", "simplejpeg") if importlib.util.find_spec(name) is None]:
  raise ModuleNotFoundError(f'nfnets.data needs {", ".join(missing)}: pip install "nfnets[train]"', name=missing[0])
