"""What differs from episode to episode: objects, camera, light and start pose, all drawn from one seed.

Three objects lie on the table, no two alike in colour and shape. Either all colours differ (a colour word is enough), or two
objects share a colour so that only the shape word tells them apart; every object that an instruction does not name is a
distractor.

Enters: a seed. Leaves: an immutable `Scene`. Any thread. Frames and units as in `mjcf`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.mjcf import OBJECT_SLOTS

COLOURS: dict[str, tuple[float, float, float]] = {
    'red': (0.84, 0.10, 0.09),
    'green': (0.10, 0.62, 0.20),
    'blue': (0.10, 0.26, 0.84),
    'yellow': (0.96, 0.80, 0.06),
}
SHAPES = ('cube', 'ball', 'cylinder')

HOME = np.array([0.0, -0.35, 0.0, -2.25, 0.0, 1.9, 0.785])
HOME_SPREAD = 0.12
WORKSPACE_X = (0.36, 0.66)
WORKSPACE_Y = (-0.26, 0.26)
MIN_SPACING = 0.09
SHARED_COLOUR_PROBABILITY = 0.3

_BASE_SIZES = {'cube': (0.024, 0.024, 0.024), 'ball': (0.028, 0.0, 0.0), 'cylinder': (0.023, 0.034, 0.0)}
_NOMINAL_CAMERA = np.array([1.12, -0.40, 0.72])
_CAMERA_LOOKS_AT = np.array([0.43, 0.0, 0.17])


@dataclass(frozen=True)
class ObjectSpec:
    """One object: ``colour`` and ``shape`` words, resting place ``x, y`` m, ``yaw`` rad and ``scale`` of the nominal size."""

    colour: str
    shape: str
    x: float
    y: float
    yaw: float
    scale: float

    @property
    def name(self) -> str:
        """``'red cube'``: unique within a scene."""
        return f'{self.colour} {self.shape}'

    @property
    def size(self) -> tuple[float, float, float]:
        """MuJoCo size parameters: half extents of a cube, radius of a ball, radius and half height of a cylinder, m."""
        a, b, c = _BASE_SIZES[self.shape]
        return (a * self.scale, b * self.scale, c * self.scale)

    @property
    def half_height(self) -> float:
        """Height of the centre above the table when upright, m."""
        return self.size[1] if self.shape == 'cylinder' else self.size[0]


@dataclass(frozen=True)
class Scene:
    """One episode's initial conditions.

    Attributes:
        seed: the number everything below was drawn from.
        objects: the objects, one per slot.
        start: float64 ``[7]`` joint positions, rad.
        fovy: vertical field of view of the scene camera, degrees.
        camera_position: float64 ``[3]``, m.
        camera_axes: float64 ``[3, 3]``, columns right, up, backward of the scene camera.
        light: brightness factor and horizontal direction ``(gain, dx, dy)``.
    """

    seed: int
    objects: tuple[ObjectSpec, ...]
    start: NDArray[np.float64]
    fovy: float
    camera_position: NDArray[np.float64]
    camera_axes: NDArray[np.float64]
    light: tuple[float, float, float]


def sample_scene(seed: int, *, jitter: bool = False) -> Scene:
    """Draw a scene; the same seed gives the same scene.

    ``jitter`` also moves the scene camera (standard deviation 1.2 cm per axis, cut at 2.5 cm, and 0.6 degrees) and the light, as
    training examples want it; objects and start pose do not depend on it.
    """
    rng = np.random.default_rng(seed)
    pairs = _kinds(rng)
    objects = tuple(
        ObjectSpec(colour, shape, float(x), float(y), float(rng.uniform(-np.pi / 4, np.pi / 4)), float(rng.uniform(0.92, 1.12)))
        for (colour, shape), (x, y) in zip(pairs, _places(rng), strict=True)
    )
    start = HOME + rng.normal(0.0, HOME_SPREAD, size=7).clip(-2 * HOME_SPREAD, 2 * HOME_SPREAD)
    fovy = float(rng.uniform(40.0, 52.0))
    position, tilt, light = _NOMINAL_CAMERA, np.zeros(3), (1.0, 0.0, 0.0)
    if jitter:
        position = position + rng.normal(0.0, 0.012, size=3).clip(-0.025, 0.025)
        tilt = rng.normal(0.0, np.deg2rad(0.6), size=3)
        light = (float(rng.uniform(0.7, 1.2)), float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.4, 0.4)))
    return Scene(seed, objects, start, fovy, position, look_at(_NOMINAL_CAMERA, _CAMERA_LOOKS_AT) @ _rotation(tilt), light)


def look_at(position: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axes ``[3, 3]`` (columns right, up, backward) of a camera at ``position`` that looks at ``target``, horizon level."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def _kinds(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Colour and shape of every slot, no two alike."""
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:OBJECT_SLOTS]]
    shapes = [str(s) for s in rng.choice(SHAPES, size=OBJECT_SLOTS)]
    if rng.random() < SHARED_COLOUR_PROBABILITY:
        first, second = rng.permutation(OBJECT_SLOTS)[:2]
        colours[second] = colours[first]
        shapes[first], shapes[second] = (str(s) for s in rng.permutation(SHAPES)[:2])
    return list(zip(colours, shapes, strict=True))


def _places(rng: np.random.Generator) -> NDArray[np.float64]:
    """Places ``[slots, 2]`` on the table, at least MIN_SPACING apart."""
    low, high = np.array([WORKSPACE_X[0], WORKSPACE_Y[0]]), np.array([WORKSPACE_X[1], WORKSPACE_Y[1]])
    while True:
        places = rng.uniform(low, high, size=(OBJECT_SLOTS, 2))
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)
        if np.all(gaps[np.triu_indices(OBJECT_SLOTS, 1)] >= MIN_SPACING):
            return places


def _rotation(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix of a rotation vector, rad."""
    angle = float(np.linalg.norm(vector))
    if angle == 0.0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
    return rotation
