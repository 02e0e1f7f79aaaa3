"""The plan of a demo, which objects to ask for and when, and how well each was reached.

Every object of the scene gets an equal share of the time, whether the arm is there early or never: the shares of different runs
compare, and staying at the object counts as much as getting there. Pure functions, any thread. Times in s, distances in m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHORTEST_REACH = 6.0


@dataclass(frozen=True)
class Reach:
    """One instruction and the share of the run that it gets, in simulated seconds."""

    instruction: str
    begin: float
    end: float


@dataclass(frozen=True)
class Sample:
    """What the simulator measured at one moment of simulated time: the instruction it judged by, the object that this names and the
    distance from the tool to its goal point (both None where it names no object), and whether the tool is there."""

    time: float
    instruction: str
    target: str | None
    distance: float | None
    success: bool

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> Sample:
        """The sample in a report of the simulator."""
        return cls(report['simulated_s'], report['instruction'], report['target'], report['distance_m'], report['success'])


@dataclass(frozen=True)
class ReachResult:
    """How one reach went. ``reached_after_s`` is the time from the instruction to the first success; ``success`` is whether the
    tool was there at the end of its share. All measured values are None where the simulator judged nothing."""

    instruction: str
    target: str | None
    initial_distance_m: float | None
    minimum_distance_m: float | None
    final_distance_m: float | None
    reached_after_s: float | None
    success: bool

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def plan_reaches(objects: Sequence[str], begin: float, seconds: float, instruction: str | None = None) -> list[Reach]:
    """Split ``seconds`` from ``begin`` on over the objects, as many as get `SHORTEST_REACH` each; or give all to ``instruction``.

    Raises:
        ValueError: no instruction is given and the scene is empty.
    """
    if instruction is not None:
        return [Reach(instruction, begin, begin + seconds)]
    if not objects:
        raise ValueError('the scene has no objects to name; give --instruction')
    count = max(1, min(len(objects), int(seconds // SHORTEST_REACH)))
    share = seconds / count
    return [Reach(f'reach the {name}', begin + k * share, begin + (k + 1) * share) for k, name in enumerate(objects[:count])]


def judge(reach: Reach, samples: Sequence[Sample]) -> ReachResult:
    """The result of one reach from the samples of the whole run."""
    mine = [s for s in samples if s.instruction == reach.instruction and reach.begin <= s.time <= reach.end]
    distances = [s.distance for s in mine if s.distance is not None]
    if not distances:
        return ReachResult(reach.instruction, None, None, None, None, None, False)
    within = [s.time for s in mine if s.success]
    return ReachResult(
        instruction=reach.instruction,
        target=mine[-1].target,
        initial_distance_m=distances[0],
        minimum_distance_m=min(distances),
        final_distance_m=distances[-1],
        reached_after_s=within[0] - reach.begin if within else None,
        success=mine[-1].success,
    )
