"""Picking and placing with the gripper: the named object is lifted, or ends in the coloured zone.

The expert is memoryless. Fingers open, it is drawn to the object from above; around it, it closes; holding it, it lifts, and for
placing travels to the zone, lowers and opens. An object that nobody asked for is put down before it is let go. What it holds is
seen in the state: the object lies between the fingers, and these are no wider apart than it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.expert import MAX_TOOL_SPEED, ArmKinematics, funnel, step_towards
from vla_policy_ros.sim.mjcf import FINGER_OPEN
from vla_policy_ros.sim.scene import ObjectSpec, Scene, sample_scene
from vla_policy_ros.sim.tasks.base import TRAINING, Conditions, Episode, Outcome, TaskState
from vla_policy_ros.sim.world import TabletopWorld

PICK_TEMPLATES = ('pick up the {}', 'grasp the {}', 'lift the {}', 'take the {}', 'pick the {} up', 'grab the {}')
HELD_OUT_PICK_TEMPLATES = ('please lift up the {}', 'can you grab the {}', 'hold the {} up')
PLACE_TEMPLATES = (
    'put the {} in the {} zone',
    'place the {} on the {} circle',
    'put the {} on the {} zone',
    'pick up the {} and place it in the {} zone',
    'place the {} in the {} zone',
)
HELD_OUT_PLACE_TEMPLATES = ('take the {} to the {} circle', 'please put the {} down in the {} zone')

FINGER_LENGTH = 0.033
"""How deep the fingers reach round an object before the hand touches it, m."""
SQUEEZE = 0.010
"""How much further in than an object's side the fingers are told to go, m."""
SLIPPED = 0.022
"""How far above the height it is taken at the fingers may be and still have an object between them, m."""
CENTRED = {'cube': 0.018, 'cylinder': 0.018, 'ball': 0.010}
"""How far from an object's axis, and above the height to take it at, the fingers may close, m.

Closing, they pull it between them; who wants to be nearer first opens and closes them in turn when the hand is unsteady. A ball
slips out of worse grasps than this.
"""
AROUND = 0.008
"""How much further from the axis the fingers still stop at the object, m."""
HELD = 0.05
"""How far from the tool's axis an object is at most that closed fingers are taken to hold, m; empty ones find out on the way up."""
GRASPED = 0.002
"""How much wider apart than the object fingers that hold it may seem to be, each, m."""
FALLS = 0.012
"""Height above the table from which an object that was not asked for is lowered before it is let go, m."""
LIFTED = 0.06
"""How high above the table an object counts as lifted, m; the expert lifts the tool to `LIFT_HEIGHT`."""
LIFT_HEIGHT = 0.14
SLOW = 0.30
"""Speed limit of a tool that holds something, m/s."""
ON_ZONE = 0.016
AT_HEIGHT = 0.014
"""How far from the zone's middle, and above the height to set down at, the fingers may open, m."""
PLACED = 0.04
"""How far from the zone's middle an object counts as placed, m."""
LEFT_THERE = 0.026
"""How far from it an object that nobody holds is left alone, m."""
_EPISODE = 7


class Pick:
    """Lift the named object."""

    name = 'pick'
    seconds = 7.0
    needs_gripper = True
    needs_zone = False
    _templates: tuple[str, ...] = PICK_TEMPLATES
    _held_out: tuple[str, ...] = HELD_OUT_PICK_TEMPLATES

    def sample(self, seed: int, conditions: Conditions) -> Episode:
        if conditions.scene.kinds == 'held_out' or conditions.naming not in ('any', 'full'):
            raise ValueError(f'{self.name} names its objects in full and has no held-out kinds; leave naming and kinds alone')
        rng = np.random.default_rng([seed, _EPISODE])
        scene = sample_scene(seed, replace(conditions.scene, zone=self.needs_zone, graspable=True))
        return self._episode(scene, int(rng.integers(len(scene.objects))), rng, conditions)

    def training_episodes(self, seed: int) -> list[Episode]:
        rng = np.random.default_rng([seed, _EPISODE])
        scene = sample_scene(seed, replace(TRAINING.scene, zone=self.needs_zone, graspable=True))
        return [self._episode(scene, int(slot), rng, TRAINING) for slot in rng.permutation(len(scene.objects))]

    def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
        tool, _ = kinematics.place(state.q)
        slot = _held(tool, state, episode)
        holds = slot is not None
        if slot is None:
            slot = episode.targets[0]
            way, target = self._fetch(tool, state, episode)
        elif slot in episode.targets:
            way, target = self._carry(tool, episode.scene, episode.scene.objects[slot])
        else:
            way, target = _put_down(tool, episode.scene.objects[slot])
        q = step_towards(kinematics, state.q, way, period, SLOW if holds else MAX_TOOL_SPEED)
        return self._moved(kinematics, state, episode.scene, slot, q, state.finger_towards(target, period), holds)

    def measure(self, world: TabletopWorld, episode: Episode) -> Outcome:
        raised = [float(world.object_position(slot)[2]) - spec.half_height for slot, spec in enumerate(episode.scene.objects)]
        error = max(0.0, LIFTED - raised[episode.targets[0]])
        if error == 0.0:
            return Outcome(True, error, '')
        if max(raised) > LIFTED / 2 and int(np.argmax(raised)) not in episode.targets:
            return Outcome(False, error, 'wrong_object')
        return Outcome(False, error, 'missed' if _touched(world, episode) else 'timed_out')

    def _carry(self, tool: NDArray[np.float64], scene: Scene, spec: ObjectSpec) -> tuple[NDArray[np.float64], float]:
        """Way for a tool that holds the object, and what the fingers are told."""
        return np.array([0.0, 0.0, LIFT_HEIGHT - tool[2]]), _half_width(spec) - SQUEEZE

    def _fetch(self, tool: NDArray[np.float64], state: TaskState, episode: Episode) -> tuple[NDArray[np.float64], float]:
        """Way for an empty hand, and what the fingers are told."""
        slot = episode.targets[0]
        if self._finished(state.objects[slot], episode.scene):
            return np.array([0.0, 0.0, max(0.0, LIFT_HEIGHT - tool[2])]), FINGER_OPEN
        return _approach(tool, state.objects[slot], episode.scene.objects[slot])

    def _finished(self, centre: NDArray[np.float64], scene: Scene) -> bool:
        return False

    def _moved(
        self,
        kinematics: ArmKinematics,
        state: TaskState,
        scene: Scene,
        slot: int,
        q: NDArray[np.float64],
        target: float,
        holds: bool,
    ) -> TaskState:
        """The state after the arm has come to ``q`` and the fingers went to ``target`` as far as they could."""
        before, _ = kinematics.place(state.q)
        after, _ = kinematics.place(q)
        spec, objects = scene.objects[slot], state.objects.copy()
        stop = _half_width(spec) if _around(before, objects[slot], spec, CENTRED[spec.shape] + AROUND) else 0.0
        finger = max(stop, target)
        objects[:, 2] = [each.half_height for each in scene.objects]
        if holds:
            objects[slot] = state.objects[slot] + (after - before if target < _half_width(spec) else 0.0)
        return TaskState(q, objects, finger, target)

    def _episode(self, scene: Scene, slot: int, rng: np.random.Generator, conditions: Conditions) -> Episode:
        templates = conditions.templates(self._templates, self._held_out)
        sentence = templates[int(rng.integers(len(templates)))]
        words = (scene.objects[slot].name,) if scene.zone is None else (scene.objects[slot].name, scene.zone.colour)
        return Episode(self.name, scene, sentence.format(*words), (slot,))


class Place(Pick):
    """Put the named object into the zone and let go of it."""

    name = 'place'
    seconds = 11.0
    needs_zone = True
    _templates, _held_out = PLACE_TEMPLATES, HELD_OUT_PLACE_TEMPLATES

    def measure(self, world: TabletopWorld, episode: Episode) -> Outcome:
        zone, slot = episode.scene.place_to_go(), episode.targets[0]
        place, spec = world.object_position(slot), episode.scene.objects[slot]
        error = float(np.hypot(place[0] - zone.x, place[1] - zone.y))
        if error < PLACED and place[2] < spec.half_height + 0.01 and world.joint_state()[0][-1] > _half_width(spec) + GRASPED:
            return Outcome(True, error, '')
        others = [other for other in range(len(episode.scene.objects)) if other != slot]
        if any(_displaced(world, episode.scene, other) for other in others) and not _displaced(world, episode.scene, slot):
            return Outcome(False, error, 'wrong_object')
        return Outcome(False, error, 'missed' if _displaced(world, episode.scene, slot) else 'timed_out')

    def _carry(self, tool: NDArray[np.float64], scene: Scene, spec: ObjectSpec) -> tuple[NDArray[np.float64], float]:
        zone, closed = scene.place_to_go(), _half_width(spec) - SQUEEZE
        to_zone = np.array([zone.x, zone.y]) - tool[:2]
        remaining, down = float(np.linalg.norm(to_zone)), _grasp_height(spec) + 0.004
        if remaining < ON_ZONE:
            return (np.zeros(3), FINGER_OPEN) if tool[2] < down + AT_HEIGHT else (np.array([*to_zone, down - tool[2]]), closed)
        # Up before along, and along before down: the height to travel at grows with the distance that is left.
        height = min(LIFT_HEIGHT, down + max(0.0, remaining - ON_ZONE) * 2.0)
        climb = height - tool[2]
        along = to_zone * min(1.0, max(0.1, (0.045 - climb) / 0.03))
        return np.array([*along, climb]), closed

    def _finished(self, centre: NDArray[np.float64], scene: Scene) -> bool:
        zone = scene.place_to_go()
        return float(np.hypot(centre[0] - zone.x, centre[1] - zone.y)) < LEFT_THERE


def _half_width(spec: ObjectSpec) -> float:
    """Half of what the fingers close on, m: a cube turns between them until its sides lie flat."""
    return spec.size[0]


def _grasp_height(spec: ObjectSpec) -> float:
    """Height of the finger tips above the table when they take a standing object, m."""
    return max(0.012, 2 * spec.half_height - FINGER_LENGTH)


def _around(tool: NDArray[np.float64], centre: NDArray[np.float64], spec: ObjectSpec, within: float) -> bool:
    """Whether the object is between the fingers, wherever both are."""
    height = tool[2] - (centre[2] - spec.half_height)
    return float(np.hypot(*(tool[:2] - centre[:2]))) < within and height < _grasp_height(spec) + SLIPPED


def _held(tool: NDArray[np.float64], state: TaskState, episode: Episode) -> int | None:
    """The slot of what the fingers hold: a target, or another object that is more than `FALLS` above the table."""
    for slot in (*episode.targets, *range(len(episode.scene.objects))):
        spec, centre = episode.scene.objects[slot], state.objects[slot]
        between = _around(tool, centre, spec, HELD) and state.finger < _half_width(spec) + GRASPED
        if between and (slot in episode.targets or centre[2] - spec.half_height > FALLS):
            return slot
    return None


def _put_down(tool: NDArray[np.float64], spec: ObjectSpec) -> tuple[NDArray[np.float64], float]:
    """Way down for a hand that holds the wrong object, and what the fingers are told.

    Down before open: a policy that for a moment takes the right object for a wrong one has not dropped it then.
    """
    return np.array([0.0, 0.0, _grasp_height(spec) - tool[2]]), _half_width(spec) - SQUEEZE


def _approach(tool: NDArray[np.float64], centre: NDArray[np.float64], spec: ObjectSpec) -> tuple[NDArray[np.float64], float]:
    """Way for an empty hand to an object, and what the fingers are told."""
    goal = np.array([*centre[:2], _grasp_height(spec)])
    close = CENTRED[spec.shape]
    if float(np.hypot(*(tool[:2] - centre[:2]))) < close and tool[2] < goal[2] + close:
        return goal - tool, _half_width(spec) - SQUEEZE
    return funnel(tool, goal), FINGER_OPEN


def _displaced(world: TabletopWorld, scene: Scene, slot: int) -> bool:
    spec, place = scene.objects[slot], world.object_position(slot)
    return float(np.hypot(place[0] - spec.x, place[1] - spec.y)) > 0.03


def _touched(world: TabletopWorld, episode: Episode) -> bool:
    slot = episode.targets[0]
    return bool(np.hypot(*(world.tcp() - world.object_position(slot))[:2]) < 0.06)
