"""Counter-based normal numbers: element i of a named tensor is a pure function of (seed, name, i)."""

import hashlib

import numpy as np

# Values are made in whole aligned blocks, so that an element never depends on where a slice starts (a vectorised log may
# round its tail differently).
BLOCK = 1 << 14


def normals(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Standard normal numbers [stop - start], fp64, of the elements start..stop-1 of the tensor `name`.

    One 64-bit Philox draw per element (Salmon et al. 2011), split into two uniforms for Box-Muller's cosine.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
    out = np.empty(stop - start)
    first = start // BLOCK * BLOCK
    generator = np.random.Philox(key=key)
    generator.advance(first // 4)  # four 64-bit draws per counter value
    for begin in range(first, stop, BLOCK):
        block = _box_muller(generator.random_raw(BLOCK))
        low, high = max(start, begin), min(stop, begin + BLOCK)
        out[low - start : high - start] = block[low - begin : high - begin]
    return out


def _box_muller(bits: np.ndarray) -> np.ndarray:
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)) + 0.5) * 2.0**-32))
    return radius * np.cos((bits & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32))
