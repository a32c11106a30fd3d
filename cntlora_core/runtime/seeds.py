"""Seeds of any size: torch takes 64 bits, and its generator on the CPU reads the lower 32 alone."""

from __future__ import annotations

import hashlib


def torch_seed(seed: int) -> int:
    """What to hand to ``manual_seed``: the seed itself below 2**32, else 64 bits of its hash.

    Handed over as they are, 0 and 2**32 would give the same numbers.
    """
    if 0 <= seed < 2**32:
        return seed
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
