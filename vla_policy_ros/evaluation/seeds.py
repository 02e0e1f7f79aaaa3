"""Which scenes an evaluation may use. Three ranges that share no scene:

    below 2^24        demonstrations and tests
    2^24 .. 2^25      ``choice``: for whoever compares recipes, hyperparameters or checkpoints
    2^25 .. 2^26      ``test``: the numbers that are reported; never used to choose anything
    2^32 and above    training (`sim.dataset`)

A task whose conditions a scene does not fulfil takes the scene 2^26 further on, and so on, up to 2^32: the last 26 bits still tell
whose scene it is.

An evaluation seed picks a block of `BLOCK` scenes in its range, and episode k is the k-th of them, so that two evaluations with
different seeds never share a scene, and a longer one begins with the shorter one. Pure functions, any thread.
"""

from __future__ import annotations

PURPOSES = {'choice': 1 << 24, 'test': 1 << 25}
"""First scene of each purpose; it has as many scenes as lie below that."""
BLOCK = 1 << 12


def scene_seeds(seed: int, episodes: int, purpose: str = 'test') -> range:
    """Scene seeds of the episodes of evaluation ``seed``.

    Raises:
        ValueError: the purpose is unknown, or seed or number of episodes leave its range.
    """
    if purpose not in PURPOSES:
        raise ValueError(f'purpose is {purpose!r}; it must be one of {", ".join(PURPOSES)}')
    blocks = PURPOSES[purpose] // BLOCK
    if not 0 <= seed < blocks:
        raise ValueError(f'seed is {seed}; it must lie in 0..{blocks - 1}, so that no scene of another range is used')
    if not 1 <= episodes <= BLOCK:
        raise ValueError(f'episodes is {episodes}; it must lie in 1..{BLOCK}: use several seeds for more')
    first = PURPOSES[purpose] + seed * BLOCK
    return range(first, first + episodes)
