"""Telling the policy something false, to see whether it listens: a wrong or missing K, a sentence about another object.

Pixels, physics and judgement stay what they are. Enters: observations and episodes. Leaves: falsified ones. Pure, any thread.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.tasks import Episode
from vla_policy_ros.types import CameraView, Observation

_PROBE = 11


@dataclass(frozen=True)
class Probe:
    """What is falsified; by default nothing.

    Attributes:
        focal_scale: factor on both focal lengths of every K that the policy is given.
        hide_k: give no K at all.
        wrong_instruction: name another object of the scene than the one that is judged.
    """

    focal_scale: float = 1.0
    hide_k: bool = False
    wrong_instruction: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.focal_scale) and 0.1 <= self.focal_scale <= 10.0):
            raise ValueError(f'wrong K: the focal length times {self.focal_scale} makes no camera; give a factor of 0.1 to 10')
        if self.hide_k and self.focal_scale != 1.0:
            raise ValueError('a K cannot be both wrong and absent: give one of --wrong-k and --no-k')

    @property
    def tells_the_truth(self) -> bool:
        """Whether nothing is falsified."""
        return self == Probe()

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)

    def seen(self, observation: Observation) -> Observation:
        """The observation as the policy gets it."""
        if self.focal_scale == 1.0 and not self.hide_k:
            return observation
        views = {name: CameraView(view.rgb, self._K(view.K), view.stamp_ns) for name, view in observation.cameras.items()}
        return replace(observation, cameras=views)

    def _K(self, K: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        if K is None or self.hide_k:
            return None
        scaled: NDArray[np.float64] = K.copy()
        scaled[[0, 1], [0, 1]] *= self.focal_scale
        return scaled


def about_another_object(episode: Episode, seed: int) -> Episode:
    """The same scene with a sentence about another object, which is now the target.

    Raises:
        ValueError: every object has the name of the target, or the sentence does not say it.
    """
    objects = episode.scene.objects
    named = objects[episode.targets[0]]
    others = [slot for slot, spec in enumerate(objects) if slot not in episode.targets and spec.name != named.name]
    if not others:
        raise ValueError(f'the scene has no other object than {named.name!r} to name instead')
    slot = others[int(np.random.default_rng([seed, _PROBE]).integers(len(others)))]
    for words in (named.name, f'{named.colour} object', named.shape):
        if words in episode.instruction:
            sentence = episode.instruction.replace(words, objects[slot].name, 1)
            return replace(episode, instruction=sentence, targets=(slot,))
    raise ValueError(f'{episode.instruction!r} does not name {named.name!r}, so that no other object can be named in its place')
