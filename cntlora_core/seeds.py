"""Seeds of any size: torch takes 64 bits, and takes -1 and 2**64 - 1 for the same."""

from __future__ import annotations

import hashlib


def torch_seed(seed: int) -> int:
    """What to hand to ``manual_seed``: the seed itself below 2**63, else 63 bits of its hash.

    Hashes lie at 2**63 and above, so that no hash meets a seed that is taken as it is.
    """
    if 0 <= seed < 2**63:
        return seed
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 2**63
