"""What a stranger meets first: the cost of importing the package, what `pip install .` gives, and README's tree."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = "import jax, flax.nnx, optax"
HEAVY = {"tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn", "tensorboardX", "ml_collections", "array_record"}
IMPORT_SECONDS = 0.3
USE_AGC = """
import importlib.metadata
import jax.numpy as jnp
import nfnets
from nfnets import agc
params, grads = {"w": jnp.ones((4, 1))}, {"w": jnp.full((4, 1), 10.0)}
clip = agc(0.01)
clipped, _ = clip.update(grads, clip.init(params), params)
print(nfnets.__file__, importlib.metadata.version("nfnets"), round(float(jnp.linalg.norm(clipped["w"])), 6))
"""


def run_python(source: str, *, cwd: pathlib.Path = ROOT, path: pathlib.Path = ROOT) -> str:
  """Runs `source` in a fresh interpreter that finds nfnets only under `path`; returns what it prints."""
  environment = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", source], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_import_is_cheap():
  """Takes the least time of several interpreters, beyond jax, flax.nnx and optax; a busy machine can only add to it."""
  source = f"import time; {BASE}; start = time.perf_counter(); import nfnets; print(time.perf_counter() - start)"
  seconds = []
  while len(seconds) < 5 and min(seconds, default=1) > IMPORT_SECONDS / 2:
    seconds.append(float(run_python(source)))
  assert min(seconds) <= IMPORT_SECONDS, f"import nfnets took {seconds} s over {BASE}"


def test_import_brings_nothing_heavy():
  """Every module that `import nfnets` adds is one of its own or of the three packages that it stands on."""
  source = f"import sys, json; {BASE}; base = set(sys.modules); import nfnets; print(json.dumps([[*base], [*sys.modules]]))"
  base, everything = map(set, json.loads(run_python(source)))
  assert {name.split(".")[0] for name in everything} & HEAVY == set()
  allowed = {"nfnets", "jax", "flax", "optax", "numpy"} | sys.stdlib_module_names
  assert {name.split(".")[0] for name in everything - base} <= allowed


def test_pip_install_gives_agc(tmp_path):
  """The package is built from a copy and without a network, since hatchling is in requirements.txt."""
  source, target = tmp_path / "source", tmp_path / "target"
  shutil.copytree(ROOT / "nfnets", source / "nfnets", ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  command = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--quiet",
    "--no-index",
    "--no-deps",
    "--no-build-isolation",
    "--disable-pip-version-check",
    "--target",
    str(target),
    str(source),
  ]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  installed = {path.name for path in target.iterdir()}
  version = version_in_source()
  assert installed == {"nfnets", f"nfnets-{version}.dist-info"}
  shipped = {str(path.relative_to(target)) for path in (target / "nfnets").rglob("*.py")}
  assert shipped == {str(path.relative_to(ROOT)) for path in (ROOT / "nfnets").rglob("*.py")}
  used = run_python(USE_AGC, cwd=tmp_path, path=target)
  assert used.split() == [str(target / "nfnets" / "__init__.py"), version, "0.02"]


def version_in_source() -> str:
  """Reads `__version__` from the source, as the build does, without running anything."""
  tree = ast.parse((ROOT / "nfnets" / "__init__.py").read_text(encoding="utf-8"))
  return next(node.value.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__")


def test_requirements_agree_with_pyproject():
  """Each package has the same range wherever it is written."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
  required = {line for line in lines if line and not line.startswith("#")}
  extras = project["optional-dependencies"]
  assert set(extras) == {
    "train",
    "export",
    "hub",
    "onnx",
    "s3",
    "gcs",
    "peers",
    "saved",
    "dev",
  }  # gcs, hub, onnx and peers (TensorFlow) are not in requirements.txt
  assert required == set(project["dependencies"]).union(*(extras[name] for name in ("train", "export", "s3", "dev")))


def tracked() -> list[str]:
  return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def readme_tree() -> list[str]:
  """Returns the paths in README's tree, which is the first code block with a line that begins with `nfnets/`.

  A line holds a path, or several with spaces between, and then two spaces or a # before its comment. A directory ends in a
  slash; two spaces more of indentation, or the lines of a drawn tree, put what follows into the directory above.
  """
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
  block = next(block for block in blocks if re.search(r"^\W*nfnets/(\s|$)", block, flags=re.MULTILINE))
  paths, above = [], []
  for line in filter(str.strip, block.splitlines()):
    indent = len(re.match(r"[\s│├└─|`-]*", line).group())
    above = [(depth, name) for depth, name in above if depth < indent]
    folder = "".join(name for _, name in above)
    names = re.split(r"\s{2,}|\s#", line[indent:].strip())[0].split()
    paths += [folder + name for name in names]
    if len(names) == 1 and names[0].endswith("/"):
      above.append((indent, names[0]))
  return paths


def test_readme_tree_is_true():
  paths = readme_tree()
  wrong = [path for path in paths if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]
  assert wrong == [], f"README's tree shows what is not there: {wrong}"
  tops = lambda paths: {path.split("/")[0] + "/" for path in paths if "/" in path}
  absent = tops(tracked()) - tops(paths)
  assert absent == set(), f"README's tree lacks {sorted(absent)}"
