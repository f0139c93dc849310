"""Which items are nearly the same picture or text? Groups of rows that lie closer than a tenth of the usual distance.

The limit is relative to the rows' own median distance, so it means the same under every encoder. Groups are connected
components: if a is nearly b and b nearly c, all three are one group. Nothing looks at which side an item is on.
Shape letters: N items, D feature width.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.drift_kernels import squared_distances

NEAR = 0.1
"""In median distances."""


def duplicate_groups(rows_ND: Any, near: float = NEAR) -> NDArray[np.int64]:
    """A group number for every row, (N,); rows without a near duplicate are alone in theirs."""
    distances = squared_distances(rows_ND)
    if len(distances) < 2:
        return np.arange(len(distances))
    apart = distances[np.triu_indices(len(distances), 1)]
    apart = apart[apart > 0]
    limit = near**2 * float(np.median(apart)) if len(apart) else 0.0
    _, groups = sparse.csgraph.connected_components(sparse.csr_matrix(distances <= limit), directed=False)
    return np.asarray(groups, np.int64)


def duplicate_flags(rows_ND: Any, near: float = NEAR) -> NDArray[np.float64]:
    """1 for every row that has a near duplicate among the others, (N,).

    For the statistic `near_duplicate` pass reference and arrivals together and split the flags: flags of each side
    alone would depend on its size, and on labels, which a permutation test may not see.
    """
    groups = duplicate_groups(rows_ND, near)
    return np.asarray(np.bincount(groups)[groups] > 1, np.float64)
