"""What differs from episode to episode: objects, camera, light, surfaces and start pose, all drawn from one seed.

Three objects lie on the table. No two are alike in colour and shape, unless a `Variation` asks for twins. Either all colours differ
(a colour word is enough), or two objects share a colour so that only the shape word tells them apart; every object that an
instruction does not name is a distractor.

Some kinds of objects are held out: they never appear in ordinary scenes, only where a `Variation` asks for them, so that training
on ordinary scenes leaves them for the question whether a policy puts known words together.

Enters: a seed and a variation. Leaves: an immutable `Scene`. Any thread. Frames and units as in `mjcf`.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.mjcf import OBJECT_SLOTS

COLOURS: dict[str, tuple[float, float, float]] = {
    'red': (0.84, 0.10, 0.09),
    'green': (0.10, 0.62, 0.20),
    'blue': (0.10, 0.26, 0.84),
    'yellow': (0.96, 0.80, 0.06),
    'orange': (0.94, 0.42, 0.05),
    'purple': (0.50, 0.14, 0.66),
}
SHAPES = ('cube', 'ball', 'cylinder')
HELD_OUT_KINDS = (('green', 'ball'), ('yellow', 'cylinder'))
UNNAMED = ''
"""Colour word of an object whose colour has no name; its tint is its colour."""

HOME = np.array([0.0, -0.35, 0.0, -2.25, 0.0, 1.9, 0.785])
HOME_SPREAD = 0.12
WORKSPACE_X = (0.36, 0.66)
WORKSPACE_Y = (-0.26, 0.26)
MIN_SPACING = 0.09
SCALES = (0.92, 1.12)
GRASPABLE_SCALES = (0.72, 0.84)
ZONE_RADIUS = 0.05
ZONE_SPACING = 0.10
SHARED_COLOUR_PROBABILITY = 0.35

FIELD_OF_VIEW = (38.0, 58.0)
CAMERA_SHIFT = 0.04
CAMERA_TILT = 0.8
TINT = 0.06

# How far, of a full circle, the hue of a colour without a name stays from those of held-out kinds. Whatever the shape: if only
# the held-out one stayed away, the gap would teach that nothing of that colour has that shape.
_HUE_DISTANCE = 0.04

_BASE_SIZES = {'cube': (0.027, 0.027, 0.027), 'ball': (0.031, 0.0, 0.0), 'cylinder': (0.024, 0.042, 0.0)}
_NOMINAL_CAMERA = np.array([1.00, -0.34, 0.62])
_CAMERA_LOOKS_AT = np.array([0.46, 0.0, 0.09])
_TABLE_TONE = np.array([0.64, 0.60, 0.55])


@dataclass(frozen=True)
class Variation:
    """How a scene departs from the nominal one. Objects and start pose depend on the seed and the first six fields only.

    Attributes:
        kinds: ``trained``, or ``held_out``: the first object is of a kind that ordinary scenes never show.
        shared_colour: whether two objects share a colour; None draws it.
        twins: the second object is of the first one's kind, so that a sentence may fit both.
        zone: a coloured disc is painted on the table, clear of the objects, and two objects or all of them are cubes, which can
            be pushed: balls roll and cylinders fall.
        unnamed_colours: the objects are a cube, a ball and a cylinder of colours without a name, none near that of a held-out kind.
        graspable: all objects are small enough for the gripper, whichever way it takes them.
        camera: ``nominal``, ``jitter`` (position uniform within CAMERA_SHIFT m per axis, axes tilted by CAMERA_TILT degrees, one
            standard deviation) or ``shifted`` (position uniform within ``camera_shift`` m per axis, nothing else).
        camera_shift: m.
        surroundings: also draw light, table tone and tints of the objects.
    """

    kinds: str = 'trained'
    shared_colour: bool | None = None
    twins: bool = False
    zone: bool = False
    unnamed_colours: bool = False
    graspable: bool = False
    camera: str = 'nominal'
    camera_shift: float = 0.025
    surroundings: bool = False

    def __post_init__(self) -> None:
        if self.kinds not in ('trained', 'held_out'):
            raise ValueError(f'kinds is {self.kinds!r}; it must be trained or held_out')
        if self.unnamed_colours and (self.kinds != 'trained' or self.twins or self.zone or self.shared_colour is not None):
            raise ValueError('unnamed_colours goes with no other wish for the kinds of the objects')
        if self.camera not in ('nominal', 'jitter', 'shifted'):
            raise ValueError(f'camera is {self.camera!r}; it must be nominal, jitter or shifted')
        if not 0.0 <= self.camera_shift <= 0.2:
            raise ValueError(f'camera_shift is {self.camera_shift} m; it must lie in 0..0.2')


NOMINAL = Variation()
JITTER = Variation(camera='jitter', surroundings=True)
"""What training examples are drawn with."""


@dataclass(frozen=True)
class ObjectSpec:
    """One object: ``colour`` and ``shape`` words, resting place ``x, y`` m, ``yaw`` rad, ``scale`` of the nominal size, and the
    ``tint`` that is added to the nominal RGB of its colour."""

    colour: str
    shape: str
    x: float
    y: float
    yaw: float
    scale: float
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def name(self) -> str:
        """``'red cube'``: unique within a scene without twins; ``'cube'`` where the colour is unnamed."""
        return self.shape if self.colour == UNNAMED else f'{self.colour} {self.shape}'

    @property
    def size(self) -> tuple[float, float, float]:
        """MuJoCo size parameters: half extents of a cube, radius of a ball, radius and half height of a cylinder, m."""
        a, b, c = _BASE_SIZES[self.shape]
        return (a * self.scale, b * self.scale, c * self.scale)

    @property
    def half_height(self) -> float:
        """Height of the centre above the table when upright, m."""
        return self.size[1] if self.shape == 'cylinder' else self.size[0]

    @property
    def rgb(self) -> tuple[float, float, float]:
        """Its colour as it is drawn."""
        nominal = COLOURS.get(self.colour, (0.0, 0.0, 0.0))
        red, green, blue = (min(1.0, max(0.0, base + shift)) for base, shift in zip(nominal, self.tint, strict=True))
        return (red, green, blue)


@dataclass(frozen=True)
class Zone:
    """A coloured disc painted on the table: ``colour`` word and centre ``x, y``, m."""

    colour: str
    x: float
    y: float


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
        table: RGB of the table top.
        zone: the disc on the table, or None.
    """

    seed: int
    objects: tuple[ObjectSpec, ...]
    start: NDArray[np.float64]
    fovy: float
    camera_position: NDArray[np.float64]
    camera_axes: NDArray[np.float64]
    light: tuple[float, float, float]
    table: tuple[float, float, float]
    zone: Zone | None = None

    def place_to_go(self) -> Zone:
        """The zone, for tasks that need one. Raises ValueError in a scene without."""
        if self.zone is None:
            raise ValueError(f'scene {self.seed} has no zone; draw it with Variation(zone=True)')
        return self.zone


def sample_scene(seed: int, variation: Variation = NOMINAL) -> Scene:
    """Draw a scene; the same seed and variation give the same scene."""
    rng, surroundings = np.random.default_rng(seed), np.random.default_rng([seed, 2])
    pairs = _kinds(rng, variation)
    objects = tuple(
        ObjectSpec(
            colour,
            shape,
            float(x),
            float(y),
            float(rng.uniform(-np.pi / 4, np.pi / 4)),
            float(rng.uniform(*(GRASPABLE_SCALES if variation.graspable else SCALES))),
            _tint(surroundings, variation, colour),
        )
        for (colour, shape), (x, y) in zip(pairs, _places(rng), strict=True)
    )
    start = HOME + rng.normal(0.0, HOME_SPREAD, size=7).clip(-2 * HOME_SPREAD, 2 * HOME_SPREAD)
    fovy = float(rng.uniform(*FIELD_OF_VIEW))
    position, axes = _camera(np.random.default_rng([seed, 3]), variation)
    zone = None
    if variation.zone:
        x, y = _clear_place(rng, objects)
        zone = Zone(list(COLOURS)[int(rng.integers(len(COLOURS)))], x, y)
    light, table = (1.0, 0.0, 0.0), _TABLE_TONE
    if variation.surroundings:
        light = (
            float(surroundings.uniform(0.7, 1.2)),
            float(surroundings.uniform(-0.4, 0.4)),
            float(surroundings.uniform(-0.4, 0.4)),
        )
        table = _TABLE_TONE * surroundings.uniform(0.6, 1.3) + surroundings.uniform(-0.06, 0.06, size=3)
    red, green, blue = (float(part) for part in np.clip(table, 0.0, 1.0))
    return Scene(seed, objects, start, fovy, position, axes, light, (red, green, blue), zone)


def _tint(rng: np.random.Generator, variation: Variation, colour: str) -> tuple[float, float, float]:
    if colour == UNNAMED:
        return _unnamed_colour(rng)
    if not variation.surroundings:
        return (0.0, 0.0, 0.0)
    red, green, blue = (float(part) for part in rng.uniform(-TINT, TINT, size=3))
    return (red, green, blue)


def _unnamed_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    """RGB of any hue but those of the colours that some shape is held out in."""
    avoided = [colorsys.rgb_to_hsv(*COLOURS[colour])[0] for colour, _ in HELD_OUT_KINDS]
    while True:
        hue = float(rng.uniform())
        if all(abs((hue - other + 0.5) % 1.0 - 0.5) > _HUE_DISTANCE for other in avoided):
            return colorsys.hsv_to_rgb(hue, float(rng.uniform(0.2, 1.0)), float(rng.uniform(0.3, 1.0)))


def _camera(rng: np.random.Generator, variation: Variation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position ``[3]`` and axes ``[3, 3]`` of the scene camera."""
    axes = look_at(_NOMINAL_CAMERA, _CAMERA_LOOKS_AT)
    if variation.camera == 'nominal':
        return _NOMINAL_CAMERA, axes
    if variation.camera == 'shifted':
        return _NOMINAL_CAMERA + rng.uniform(-1.0, 1.0, size=3) * variation.camera_shift, axes
    tilt = rng.normal(0.0, np.deg2rad(CAMERA_TILT), size=3)
    return _NOMINAL_CAMERA + rng.uniform(-CAMERA_SHIFT, CAMERA_SHIFT, size=3), axes @ _rotation(tilt)


def look_at(position: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axes ``[3, 3]`` (columns right, up, backward) of a camera at ``position`` that looks at ``target``, horizon level."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def _kinds(rng: np.random.Generator, variation: Variation) -> list[tuple[str, str]]:
    """Colour and shape of every slot: no two alike (but twins), held-out kinds only where they are asked for."""
    if variation.unnamed_colours:
        return [(UNNAMED, str(shape)) for shape in rng.permutation(SHAPES)]
    while True:
        colours = [str(c) for c in rng.permutation(list(COLOURS))[:OBJECT_SLOTS]]
        shapes = [str(s) for s in rng.choice(SHAPES, size=OBJECT_SLOTS)]
        shared = rng.random() < SHARED_COLOUR_PROBABILITY if variation.shared_colour is None else variation.shared_colour
        first, second = (int(slot) for slot in rng.permutation(OBJECT_SLOTS)[:2])
        if variation.kinds == 'held_out':
            first, second = 0, 1 + int(rng.integers(OBJECT_SLOTS - 1))
            colours[0], shapes[0] = HELD_OUT_KINDS[int(rng.integers(len(HELD_OUT_KINDS)))]
        if shared:
            colours[second] = colours[first]
            shapes[second] = str(rng.choice([shape for shape in SHAPES if shape != shapes[first]]))
        if variation.zone:
            shapes[:2] = ['cube', 'cube']
        if variation.twins:
            colours[1], shapes[1] = colours[0], shapes[0]
        kinds = list(zip(colours, shapes, strict=True))
        ordinary = kinds[1:] if variation.kinds == 'held_out' else kinds
        as_wanted = variation.twins or (len(set(colours)) < OBJECT_SLOTS) == shared
        alike = len(kinds) - len(set(kinds))
        if as_wanted and alike == int(variation.twins) and not any(kind in HELD_OUT_KINDS for kind in ordinary):
            return kinds


def _places(rng: np.random.Generator) -> NDArray[np.float64]:
    """Places ``[slots, 2]`` on the table, at least MIN_SPACING apart."""
    low, high = np.array([WORKSPACE_X[0], WORKSPACE_Y[0]]), np.array([WORKSPACE_X[1], WORKSPACE_Y[1]])
    while True:
        places = rng.uniform(low, high, size=(OBJECT_SLOTS, 2))
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)
        if np.all(gaps[np.triu_indices(OBJECT_SLOTS, 1)] >= MIN_SPACING):
            return places


def _clear_place(rng: np.random.Generator, objects: tuple[ObjectSpec, ...]) -> tuple[float, float]:
    """A place for a zone, at least ZONE_SPACING from every object; where the table is too full, the best of many."""
    low, high = np.array([WORKSPACE_X[0], WORKSPACE_Y[0]]), np.array([WORKSPACE_X[1], WORKSPACE_Y[1]])
    places = rng.uniform(low, high, size=(64, 2))
    gaps = np.linalg.norm(places[:, None] - np.array([[spec.x, spec.y] for spec in objects])[None], axis=-1).min(axis=1)
    clear = np.flatnonzero(gaps >= ZONE_SPACING)
    x, y = places[int(clear[0]) if len(clear) else int(gaps.argmax())]
    return float(x), float(y)


def _rotation(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix of a rotation vector, rad."""
    angle = float(np.linalg.norm(vector))
    if angle == 0.0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
    return rotation
