"""Pushing: the named cube ends in the coloured zone.

The expert is memoryless: the tool belongs behind the object, on the line from the zone through its centre, and the side of the
hand with the wrist camera first. With the camera behind, the hand would hide the object from it, and the arm often from the other
camera. From elsewhere the tool is drawn there from above, down a funnel, while the hand turns; behind the object, low enough and
turned, it drives forward and steers back to the line. Once the object lies in the zone, the tool rises.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.expert import MAX_TOOL_SPEED, ArmKinematics, funnel, step_towards
from vla_policy_ros.sim.instructions import instruction_for
from vla_policy_ros.sim.scene import ZONE_RADIUS, ObjectSpec, Scene, Zone, sample_scene
from vla_policy_ros.sim.tasks.base import TRAINING, Conditions, Episode, Outcome, TaskState
from vla_policy_ros.sim.world import TabletopWorld

TEMPLATES = (
    'push the {} to the {} zone',
    'push the {} into the {} zone',
    'push the {} onto the {} circle',
    'move the {} into the {} zone',
    'slide the {} to the {} zone',
)
HELD_OUT_TEMPLATES = (
    'please push the {} over to the {} circle',
    'take the {} and push it into the {} zone',
)

TOOL_HEIGHT = 0.014
"""Of the tool above the table while it pushes, m: low, so that who is a centimetre too high is behind the cube still, not on its
edge."""
TOOL_RADIUS = 0.015
"""From the tool's axis to what touches the cube, m: the fingers. The palm, where a cube is so high, touches 1 cm earlier; only
pictures of examples that were not played in physics show it."""
BEHIND = 0.055
"""Gap between the tool and the cube that is to be pushed at the place behind it, m: to come down there a few centimetres amiss is
not to come down on the cube."""
FLOOR_RADIUS = 0.03
"""Distance from that place within which the tool comes down to its working height, m."""
STEEPNESS = 1.5
"""How high above its working height the tool travels, m per m of distance beyond `FLOOR_RADIUS` from its place behind the object:
steep enough to be well above the object while it passes over it."""
CARROT = 0.1
LOW = (0.038, 0.05)
LINE = (0.02, 0.055)
NEAR = (BEHIND + 0.02, BEHIND + 0.04)
PRESSED = (0.03, 0.04)
"""Height, distance from the line and from the object, m, up to which the tool drives forward, and from which it goes back."""
DESCENT = 0.5
"""How much higher it may be, m per m of distance from the object: it comes down as it drives."""
ARRIVED = 0.03
ARRIVED_DRIVING = 0.01
"""Distance of the object from the zone's middle, m, within which it is left there by a tool that does not drive it, and by one that
does: what is on its way goes further in than it must lie."""
CLEARANCE = 0.12
"""Height above the object that the tool rises to at least once it has arrived, m: about as high as it travels. There the hand hides
nothing, and from there another attempt looks like the first one; just above the object, it and leaving things as they are would
differ by half a second."""
FINGERS = 0.005
"""Distance of each finger of a gripper from the middle, m: nearly closed, so that no finger comes down on a cube."""
SIGHTED = (1.0, 1.4)
"""Angle, rad, between the push and the side of the hand that the wrist camera is on, up to which the tool drives, and from which it
waits for the hand to turn: from behind a cube the camera shows it about that far."""
WAITING = 0.08
"""How much higher the tool waits behind the object until the camera sees it, m."""
PUSH_SPEED = 0.3
TURN_SPEED = 1.5
"""Turn that is wished for at most, rad/s; of it the hand makes `expert.APPROACH_RATE`'s share of a period, 0.6 rad/s at 0.1 s, as
quick as a joint goes. A half turn takes five of the ten seconds."""
SUCCESS_DISTANCE = 0.04
MOVED = 0.05
_STEERING = 1.5
# Of the last joint, rad, more than the expert keeps anyway; and how far off the camera may stay where that joint ends: less than
# SIGHTED, and more than half of the 0.7 rad that the joint lacks of a full circle, or there would be pushes that the hand cannot
# turn to.
_LIMIT_MARGIN = 0.1
_OFF_AT_LIMIT = 0.9
_EPISODE = 7


class Push:
    """Push the named cube into the zone; two others are in the way or not."""

    name = 'push'
    seconds = 10.0
    needs_gripper = False
    needs_zone = True

    def sample(self, seed: int, conditions: Conditions) -> Episode:
        if conditions.scene.kinds == 'held_out' or conditions.naming not in ('any', 'full'):
            raise ValueError('push names its objects in full and has no held-out kinds; leave naming and kinds alone')
        rng = np.random.default_rng([seed, _EPISODE])
        scene = sample_scene(seed, replace(conditions.scene, zone=True))
        cubes = _cubes(scene)
        return self._episode(scene, cubes[int(rng.integers(len(cubes)))], rng, conditions)

    def training_episodes(self, seed: int) -> list[Episode]:
        rng = np.random.default_rng([seed, _EPISODE])
        scene = sample_scene(seed, replace(TRAINING.scene, zone=True))
        pushes = [self._episode(scene, int(slot), rng, TRAINING) for slot in rng.permutation(_cubes(scene))]
        # The same picture and a sentence that does not ask for a push: otherwise the zone alone would say that something is pushed.
        slot = int(rng.integers(len(scene.objects)))
        return [*pushes, Episode('reach', scene, instruction_for(scene.objects[slot], scene.objects, rng), (slot,))]

    def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
        slot = episode.targets[0]
        spec, zone = episode.scene.objects[slot], episode.scene.place_to_go()
        tool, _ = kinematics.place(state.q)
        off, turn = _turn(kinematics, state.q, np.array([zone.x, zone.y]) - state.objects[slot][:2])
        way, speed = _way(tool, state.objects[slot], spec, zone, off)
        most = TURN_SPEED * period
        q = step_towards(kinematics, state.q, way, period, speed, min(most, max(-most, turn)))
        objects = state.objects.copy()
        objects[slot] = _carried(kinematics.place(q)[0], objects[slot], spec)
        finger = state.finger_towards(FINGERS, period)
        return TaskState(q, objects, finger, finger)

    def measure(self, world: TabletopWorld, episode: Episode) -> Outcome:
        zone = episode.scene.place_to_go()
        place = np.array([zone.x, zone.y])
        error = float(np.linalg.norm(world.object_position(episode.targets[0])[:2] - place))
        if error < SUCCESS_DISTANCE:
            return Outcome(True, error, '')
        moved = [
            float(np.linalg.norm(world.object_position(slot)[:2] - [spec.x, spec.y]))
            for slot, spec in enumerate(episode.scene.objects)
        ]
        if max(moved) > MOVED and int(np.argmax(moved)) not in episode.targets:
            return Outcome(False, error, 'wrong_object')
        return Outcome(False, error, 'missed' if error < ZONE_RADIUS + SUCCESS_DISTANCE else 'timed_out')

    def _episode(self, scene: Scene, slot: int, rng: np.random.Generator, conditions: Conditions) -> Episode:
        templates = conditions.templates(TEMPLATES, HELD_OUT_TEMPLATES)
        sentence = templates[int(rng.integers(len(templates)))].format(scene.objects[slot].name, scene.place_to_go().colour)
        return Episode(self.name, scene, sentence, (slot,))


def _cubes(scene: Scene) -> list[int]:
    """Slots that can be pushed: balls would roll, and cylinders fall."""
    return [slot for slot, spec in enumerate(scene.objects) if spec.shape == 'cube']


def _contact(spec: ObjectSpec) -> float:
    """Distance from the cube's axis to the tool's when they touch, m: the mean over the directions of the cube."""
    return spec.size[0] * 1.13 + TOOL_RADIUS


def _way(
    tool: NDArray[np.float64], centre: NDArray[np.float64], spec: ObjectSpec, zone: Zone, off: float
) -> tuple[NDArray[np.float64], float]:
    """Way ``[3]`` (m) for the ``tool [3]``, and its speed limit, m/s; ``centre [3]`` is the object's, all in the base frame, m, and
    ``off`` the angle, rad, from the wrist camera's side to the push, as `_turn` gives it.

    Up once the object has arrived. Else two ways, to the place behind the object and forward with it, and a share of each that
    changes little from one centimetre to the next: who sees the scene a little wrong, as a policy does, still does nearly the right
    thing.
    """
    to_zone = np.array([zone.x, zone.y]) - centre[:2]
    remaining = float(np.linalg.norm(to_zone))
    ahead = to_zone / max(remaining, 1e-9)
    relative = tool[:2] - centre[:2]
    beside = relative - float(relative @ ahead) * ahead
    gap = -float(relative @ ahead) - _contact(spec)
    behind = centre[:2] - ahead * (_contact(spec) + BEHIND)
    sighted = _falling(abs(off), *SIGHTED)
    back = funnel(tool, np.array([*behind, TOOL_HEIGHT + (1.0 - sighted) * WAITING]), FLOOR_RADIUS, STEEPNESS)
    forward = min(max(0.0, gap) + remaining, CARROT) * ahead - _STEERING * beside
    drive = np.array([*forward, TOOL_HEIGHT - tool[2]])
    height, off_line = tool[2] - DESCENT * max(0.0, gap), float(np.linalg.norm(beside))
    share = sighted * _falling(height, *LOW) * _falling(off_line, *LINE) * _falling(gap, *NEAR) * _falling(-gap, *PRESSED)
    if remaining < share * ARRIVED_DRIVING + (1.0 - share) * ARRIVED:
        return np.array([0.0, 0.0, max(0.0, 2 * spec.half_height + CLEARANCE - tool[2])]), MAX_TOOL_SPEED
    return share * drive + (1.0 - share) * back, share * PUSH_SPEED + (1.0 - share) * MAX_TOOL_SPEED


def _falling(value: float, low: float, high: float) -> float:
    """1 up to ``low``, 0 from ``high`` on."""
    return min(1.0, max(0.0, (high - value) / (high - low)))


def _turn(kinematics: ArmKinematics, q: NDArray[np.float64], ahead: NDArray[np.float64]) -> tuple[float, float]:
    """Angle in [-pi, pi), rad, from the wrist camera's side of the hand to the push, counter-clockwise from above, and the turn
    (rad, likewise) that makes up for it, or nearly so where the last joint ends: the shorter way round, no turn within `ARRIVED`.

    ``ahead [2]`` is from the object to the zone, m; ``q [7]``, rad, is that of the last `ArmKinematics.place`.
    """
    heading = kinematics.heading()
    off = float(np.arctan2(ahead[1], ahead[0]) - np.arctan2(heading[1], heading[0]) + np.pi) % (2 * np.pi) - np.pi
    if float(np.linalg.norm(ahead)) < ARRIVED:
        return off, 0.0
    # The hand hangs upside down: a turn to the left about the vertical lowers the last joint.
    least, greatest = q[-1] - kinematics.upper[-1] + _LIMIT_MARGIN, q[-1] - kinematics.lower[-1] - _LIMIT_MARGIN
    ways = [(float(np.clip(angle, least, greatest)), angle) for angle in (off, off - 2 * np.pi, off + 2 * np.pi)]
    return off, min((turn for turn, angle in ways if abs(angle - turn) < _OFF_AT_LIMIT), key=abs)


def _carried(tool: NDArray[np.float64], centre: NDArray[np.float64], spec: ObjectSpec) -> NDArray[np.float64]:
    """The object's centre after the tool has come to ``tool``: pushed straight away from it, as far as they would overlap."""
    away = centre[:2] - tool[:2]
    distance = float(np.linalg.norm(away))
    overlap = _contact(spec) - distance
    if tool[2] > 2 * spec.half_height or overlap <= 0.0 or distance < 1e-6:
        return centre
    return np.array([*(centre[:2] + away / distance * overlap), centre[2]])
