"""Episodes shared among processes. An episode depends on nothing but its cell, so that who plays it does not matter."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, Protocol

from vla_policy_ros.evaluation.report import EpisodeResult


class Cell(NamedTuple):
    """One episode to be played."""

    task: str
    variation: str
    seed: int


class Player(Protocol):
    """Plays episodes; a context manager that frees what it holds."""

    def __enter__(self) -> Player: ...

    def __exit__(self, *error: object) -> None: ...

    def play(self, cell: Cell) -> EpisodeResult: ...


def played(make: Callable[[], Player], cells: Sequence[Cell], jobs: int, own: Player | None = None) -> Iterator[EpisodeResult]:
    """The results of all cells, in order. Errors of a player are raised here.

    Args:
        make: makes a player; called once per process, so it must be picklable for ``jobs > 1``.
        cells: what to play.
        jobs: processes; 1 plays here.
        own: a player that exists here already, used for ``jobs == 1``.
    """
    if jobs > 1:
        yield from _shared(make, cells, jobs)
    elif own is not None:
        yield from map(own.play, cells)
    else:
        with make() as player:
            yield from map(player.play, cells)


def _shared(make: Callable[[], Player], cells: Sequence[Cell], jobs: int) -> Iterator[EpisodeResult]:
    # Processes that are started anew, not forked: a forked OpenGL context or thread pool does not work.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(jobs, context, _begin, (make,)) as pool:
        try:
            yield from pool.map(_play, cells)
        except BaseException:
            # Whatever ends it, also an interrupt or a consumer that has seen enough: what has not begun need not.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_PLAYERS: list[Player] = []


def _begin(make: Callable[[], Player]) -> None:
    """In a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when work ends
    _PLAYERS.append(make().__enter__())


def _play(cell: Cell) -> EpisodeResult:
    return _PLAYERS[0].play(cell)
