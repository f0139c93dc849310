"""Evidently's embedding-drift detectors, called on the same arrays as ours.

Optional, in an environment of its own (`pip install .[bench]`): it needs pandas below 3, which Fresco's pins are above.

"default" is what its EmbeddingsDrift metric does when nothing is chosen: a classifier whose AUROC is compared with
0.55 or, below 1,000 rows of reference, with that of random scores.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Detector = Callable[[np.ndarray, np.ndarray], bool]


def evidently_detectors() -> dict[str, Detector]:
    """Detectors by name, each (reference (N, D), arrivals (M, D)) -> drift; empty where it cannot be imported."""
    try:
        from evidently.legacy.metrics.data_drift import embedding_drift_methods as methods
    except ImportError as error:
        print(f"\nEvidently is left out: {error}; `pip install .[bench]` into an environment of its own adds it")
        return {}
    return {
        "Evidently, default": lambda one, other: _asked(methods.model(bootstrap=len(one) < 1000), one, other),
        "Evidently, MMD with bootstrap": lambda one, other: _asked(methods.mmd(bootstrap=True), one, other),
        "Evidently, MMD > 0.015": lambda one, other: _asked(methods.mmd(), one, other),
        "Evidently, share of components": lambda one, other: _asked(methods.ratio(), one, other),
    }


def _asked(method: Any, reference: np.ndarray, arrivals: np.ndarray) -> bool:
    import pandas as pd

    names = [f"c{column}" for column in range(reference.shape[1])]
    frames = [pd.DataFrame(rows.astype(np.float64), columns=names) for rows in (arrivals, reference)]
    return bool(method(*frames)[1])
