"""Bags that something happened to."""

from __future__ import annotations

import random
import shutil
from pathlib import Path


def broken(path: Path, source: Path, seed: int) -> Path:
    """A copy of the bag ``source`` of which one file is cut or has a few bytes flipped."""
    rng = random.Random(seed)
    bag = Path(shutil.copytree(source, path))
    file = rng.choice(sorted(bag.iterdir())) if seed % 4 == 0 else next(f for f in bag.iterdir() if f.suffix != '.yaml')
    data = bytearray(file.read_bytes())
    if seed % 2:
        data = data[: rng.randrange(len(data))]
    else:
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return bag
