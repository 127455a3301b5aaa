"""How alike a network makes different images: cosine similarity, stable rank and orthogonality gap of their features."""

import jax
import jax.numpy as jnp

Array = jax.Array


def similarity(features: Array) -> dict[str, Array]:
  """Measures how alike the features of n images are, all of it by the n × n matrix of their inner products, in float32.

  Args:
    features: [n, …], flattened to H [d, n] with an image a column; n ≥ 2. They are not centred, as in
      the code of Lubana et al., which brings the features of each image to length 1 first.

  Returns:
    Float32 [] each.
    "cosine": mean cosine similarity of two different images (Lubana et al. 2021, section 4); 1 if all are alike.
    "stable_rank": tr(C) / ‖C‖₂ of C = H Hᵀ / n, from 1, for features that are all alike, to min(n, d) (Lubana et al. 2021).
    "effective_rank": tr(C)² / ‖C‖²_F, a larger number in the same range (Daneshmand et al. 2020, section 3).
    "orthogonality_gap": ‖Hᵀ H / ‖H‖²_F - I / n‖_F, 0 if all are orthogonal and equally long (Daneshmand et al. 2021, section 3).
  """
  flat = features.reshape(features.shape[0], -1).astype(jnp.float32)
  n = flat.shape[0]
  flat = flat / jnp.maximum(
    jnp.max(jnp.abs(flat)), 1e-30
  )  # squares of large activations would overflow; nothing here has a scale
  gram = jnp.matmul(flat, flat.T, precision="highest")
  lengths = jnp.sqrt(jnp.maximum(jnp.diag(gram), 1e-30))
  cosines = gram / (lengths[:, None] * lengths[None, :])
  share = gram / jnp.trace(gram)
  return {
    "cosine": (jnp.sum(cosines) - jnp.trace(cosines)) / (n * (n - 1)),
    "stable_rank": 1 / jnp.max(jnp.linalg.eigvalsh(share)),
    "effective_rank": 1 / jnp.sum(share**2),
    "orthogonality_gap": jnp.linalg.norm(share - jnp.eye(n) / n),
  }
