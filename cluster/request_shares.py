"""Which requests belong to a share: decided by a hash of the request id, so every replica decides alike.

A request id is always on the same side, whatever is asked and when. Each use has a salt of its own, so the challenger's
requests and the shadows' are drawn apart. (What is captured is drawn by lot: `capture`.)
"""

import hashlib


def in_share(request_id: str, share: float, salt: str) -> bool:
    """Whether a request belongs to the share in [0, 1] that `salt` names."""
    digest = hashlib.sha256(f"{salt}\0{request_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
