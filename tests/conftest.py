"""Eight fake CPU devices for the whole suite; must be set before jax starts its backend."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
