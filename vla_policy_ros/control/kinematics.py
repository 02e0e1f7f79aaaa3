"""Where a link of the robot is, from a URDF: a serial chain of joints, evaluated for many joint positions at once.

MuJoCo reads the URDF and works out the geometry; it is a dependency already, and unlike pinocchio (a large binary beside it) and
yourdfpy (which loads meshes and scenes, and is rarely released) it adds none. What is kept of its model are the constant
transforms between the joints, because a numpy product over all rows costs a fifth of one `mj_kinematics` call per row, has no
state that threads would share, and has the same numbers from which the bounds on the motion between two rows are made.

Enters: a URDF, the commanded joints, two links. Leaves: an immutable `Chain`. Any thread. Units m and rad; frame of the base link.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class UrdfError(ValueError):
    """The URDF does not give the chain that was asked for; the message names what is missing and what there is."""


@dataclass(frozen=True)
class Chain:
    """The joints between two links, base first: ``K`` of them, driven by ``J`` commanded joints.

    Joint k turns about (or slides along) the z axis of its own frame. That frame lies in the frame of joint k - 1 (the first in
    the base) by ``rotations[k]`` and ``offsets[k]``; the tip is at ``tip`` in the frame of the last.

    Attributes:
        revolute: bool ``[K]``, else prismatic.
        rotations: float64 ``[K, 3, 3]``.
        offsets: float64 ``[K, 3]``, m.
        tip: float64 ``[3]``, m.
        gains: float64 ``[J, K]``; joint k is at ``q @ gains[:, k] + shifts[k]``: 1 for a commanded joint, the multiplier for one
            that mimics it, 0 for one that is held.
        shifts: float64 ``[K]``, the offset of a joint that mimics another, the position of one that is held.
    """

    revolute: NDArray[np.bool_]
    rotations: Array
    offsets: Array
    tip: Array
    gains: Array
    shifts: Array

    @classmethod
    def from_urdf(
        cls,
        path: str | Path,
        commanded: Sequence[str],
        tip: str,
        base: str | None = None,
        held: Mapping[str, float] | None = None,
        unrelated: Collection[str] = (),
    ) -> Chain:
        """The chain from link ``base`` (default: the root) to link ``tip`` of the URDF at ``path``.

        Args:
            commanded: names of the ``J`` joints, in the order of the position vectors.
            held: positions of joints that are not commanded, 0 where none is given; rad or m.
            unrelated: commanded joints that the URDF need not have, because they do not move the tip.

        Raises:
            UrdfError: the file cannot be read or compiled, a link or joint is not in it, ``base`` is not above ``tip``, a joint of
                the chain is of a kind that is not supported or is held outside its limits, or no commanded joint moves the tip.
        """
        tree = _Tree(Path(path))
        joints = tree.between(base, tip)
        drives = _drives(tree, commanded, held or {}, unrelated)
        moving = [joint for joint in joints if joint.get('type') != 'fixed']
        links = [drives.of(joint.get('name', '')) for joint in moving]
        if not any(np.any(gain) for gain, _ in links):
            raise UrdfError(f'{path}: no commanded joint moves link {tip!r} relative to {base or tree.root!r}')
        for joint, (gain, shift) in zip(moving, links, strict=True):
            if not np.any(gain):
                _check_held(joint, shift, path)
        geometry = _geometry(joints, path)
        return cls(*geometry, np.array([gain for gain, _ in links]).T, np.array([shift for _, shift in links]))

    def positions(self, q: Array) -> Array:
        """Positions ``[N, 3]`` of the tip in the base frame, m, for commanded joint positions ``q [N, J]``."""
        chain = q @ self.gains + self.shifts
        cosines, sines = np.cos(chain), np.sin(chain)
        # The tip is carried from frame to frame towards the base: vectors only, no products of matrices.
        x = np.repeat(self.tip[:, None], len(q), axis=1)
        for k in range(len(self.revolute) - 1, -1, -1):
            if self.revolute[k]:
                c, s = cosines[:, k], sines[:, k]
                x = np.stack([c * x[0] - s * x[1], s * x[0] + c * x[1], x[2]])
            else:
                x[2] += chain[:, k]
            x = self.rotations[k] @ x + self.offsets[k][:, None]
        positions: Array = x.T
        return positions

    def curvature(self, travel: Array, speed: Array, acceleration: Array) -> Array:
        """An upper bound ``[S]`` of the tip's acceleration, m/s^2, on ``S`` stretches of a motion.

        Args:
            travel: ``[J]``, largest ``|position|`` of the commanded joints on all of it.
            speed, acceleration: ``[S, J]``, largest ``|velocity|`` and ``|acceleration|`` on each stretch.

        The tip moves by at most `reach` per radian of joint k. Turning joint i changes the direction of that derivative for every
        joint k behind it, so the second derivative with respect to i and k is at most the reach of k, and it is 0 where i
        slides or nothing turns before k.
        """
        reach = self._reach(travel)
        gains = np.abs(self.gains)
        u, a = speed @ gains, acceleration @ gains
        turning = u * self.revolute
        before = np.cumsum(turning, axis=1) - turning
        bound: Array = (a + u * (2.0 * before + turning)) @ reach
        return bound

    def _reach(self, travel: Array) -> Array:
        """Largest movement ``[K]`` of the tip per unit of each joint: its largest distance from the axis, 1 if the joint slides."""
        travelled = travel @ np.abs(self.gains) + np.abs(self.shifts)
        reach = np.ones(len(self.revolute))
        # Of the tip in the frame of joint k: its distance from the axis, and from the origin.
        aside, away = float(np.hypot(*self.tip[:2])), float(np.linalg.norm(self.tip))
        for k in range(len(reach) - 1, -1, -1):
            if self.revolute[k]:
                reach[k] = aside
            else:
                away += float(travelled[k])
            aside = float(np.hypot(*self.offsets[k][:2])) + away
            away += float(np.linalg.norm(self.offsets[k]))
        return reach


class _Tree:
    """The links and joints of a URDF, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            robot = ElementTree.fromstring(path.read_text(encoding='utf-8'))
        except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
            raise UrdfError(f'{path}: cannot be read as a URDF ({error})') from error
        if any('xacro' in element.tag for element in robot.iter()):
            raise UrdfError(f'{path}: holds xacro, not plain URDF: expand it with `xacro {path.name} > robot.urdf`')
        self.links = [link.get('name', '') for link in robot.findall('link')]
        joints = robot.findall('joint')
        self.joints = {joint.get('name', ''): joint for joint in joints}
        self._above = {_end(joint, 'child'): joint for joint in joints}
        if not len(joints) == len(self.joints) == len(self._above):
            raise UrdfError(f'{path}: two joints have the same name or the same child link; a URDF is a tree')
        self.root = next((link for link in self.links if link not in self._above), '')

    def between(self, base: str | None, tip: str) -> list[ElementTree.Element]:
        """The joints from link ``base``, or the root, to link ``tip``."""
        for key, link in (('tip', tip), ('base', base)):
            if link is not None and link not in self.links:
                raise UrdfError(f'{self.path}: {key} {_unknown(link, "link", self.links)}')
        joints: list[ElementTree.Element] = []
        passed = [tip]
        while passed[-1] != base and passed[-1] in self._above:
            joint = self._above[passed[-1]]
            joints.append(joint)
            passed.append(_end(joint, 'parent'))
            if len(joints) > len(self.joints):
                raise UrdfError(f'{self.path}: the joints above link {tip!r} form a circle')
        if base is not None and passed[-1] != base:
            raise UrdfError(
                f'{self.path}: base {base!r} does not lie between the root and tip {tip!r}; use one of {", ".join(passed[:0:-1])}'
            )
        return joints[::-1]


@dataclass(frozen=True)
class _Drives:
    """What moves each joint of the tree: ``position = q @ gain + shift``."""

    tree: _Tree
    commanded: tuple[str, ...]
    held: Mapping[str, float]

    def of(self, name: str, mimicking: tuple[str, ...] = ()) -> tuple[Array, float]:
        """Gain ``[J]`` and shift of a joint. A command counts before ``<mimic>``, and that before a held position."""
        if name in self.commanded:
            return np.eye(len(self.commanded))[self.commanded.index(name)], 0.0
        mimic = self.tree.joints[name].find('mimic')
        if mimic is None:
            return np.zeros(len(self.commanded)), float(self.held.get(name, 0.0))
        leader, mimicking = mimic.get('joint', ''), (*mimicking, name)
        if leader not in self.tree.joints or leader in mimicking:
            raise UrdfError(f'{self.tree.path}: joint {name!r} mimics {leader!r}, which is no other joint of the URDF')
        gain, shift = self.of(leader, mimicking)
        multiplier, offset = (_number(mimic, key, default, name, self.tree.path) for key, default in _MIMIC)
        return multiplier * gain, multiplier * shift + offset


_MIMIC = (('multiplier', 1.0), ('offset', 0.0))


def _drives(tree: _Tree, commanded: Sequence[str], held: Mapping[str, float], unrelated: Collection[str]) -> _Drives:
    """Checks that every joint that is named is one that moves, and that no joint is both held and commanded."""
    movable = [name for name, joint in tree.joints.items() if joint.get('type') != 'fixed']
    for name in commanded:
        if name not in movable and name not in unrelated:
            problem = _unknown(name, 'moving joint', movable)
            raise UrdfError(
                f'{tree.path}: commanded joint {problem}; a joint that does not move the tip may be listed as unrelated'
            )
    for name in held:
        if name not in movable:
            raise UrdfError(f'{tree.path}: held joint {_unknown(name, "moving joint", movable)}')
    for name in held:
        if name in commanded or tree.joints[name].find('mimic') is not None:
            raise UrdfError(f'{tree.path}: joint {name!r} is commanded, or mimics another, and cannot be held as well')
    return _Drives(tree, tuple(commanded), held)


def _check_held(joint: ElementTree.Element, position: float, path: str | Path) -> None:
    """A joint that nothing moves stands where it can stand: outside its limits the tip would be computed for another robot."""
    limit, name = joint.find('limit'), joint.get('name', '')
    if limit is None or joint.get('type') == 'continuous':
        return
    lower, upper = (_number(limit, key, 0.0, name, path) for key in ('lower', 'upper'))
    if not lower - 1e-6 <= position <= upper + 1e-6:
        raise UrdfError(
            f'{path}: joint {name!r} moves the tip but is not commanded, and {position:g} is outside its limits '
            f'[{lower:g}, {upper:g}]: give its position in held'
        )


def _geometry(joints: list[ElementTree.Element], path: str | Path) -> tuple[NDArray[np.bool_], Array, Array, Array]:
    """``revolute, rotations, offsets, tip`` of a `Chain`, as MuJoCo compiles the joints."""
    mujoco = _mujoco()
    for joint in joints:
        if joint.get('type') not in ('fixed', 'revolute', 'continuous', 'prismatic'):
            raise UrdfError(
                f'{path}: joint {joint.get("name")!r} above the tip is {joint.get("type")!r}; only revolute, continuous, '
                'prismatic and fixed joints are supported: choose a base below it'
            )
    try:
        model = mujoco.MjModel.from_xml_string(_bare_urdf(joints))
    except ValueError as error:
        raise UrdfError(f'{path}: MuJoCo cannot compile the joints above the tip: {error}') from error

    revolute, rotations, offsets = [], [], []
    rotation, offset = np.eye(3), np.zeros(3)  # from the frame of the last joint, or the base, to the present body
    for body in range(1, model.nbody):
        fixed = np.zeros(9)
        mujoco.mju_quat2Mat(fixed, model.body_quat[body])
        offset = offset + rotation @ model.body_pos[body]
        rotation = rotation @ fixed.reshape(3, 3)
        if model.body_jntnum[body]:
            joint_id = model.body_jntadr[body]
            axis = _frame_along(model.jnt_axis[joint_id])
            revolute.append(bool(model.jnt_type[joint_id] == mujoco.mjtJoint.mjJNT_HINGE))
            rotations.append(rotation @ axis)
            offsets.append(offset)
            rotation, offset = axis.T, np.zeros(3)
    return np.array(revolute), np.array(rotations), np.array(offsets), offset


def _bare_urdf(joints: list[ElementTree.Element]) -> str:
    """A URDF of these joints alone: meshes would have to be found, and a link without mass would not compile."""
    robot = ElementTree.Element('robot', name='chain')
    options = ElementTree.SubElement(robot, 'mujoco')
    ElementTree.SubElement(options, 'compiler', fusestatic='false', boundmass='1', boundinertia='1')
    for link in dict.fromkeys([_end(joints[0], 'parent'), *(_end(joint, 'child') for joint in joints)]):
        ElementTree.SubElement(robot, 'link', name=link)
    for joint in joints:
        # Limits of position have no part in kinematics, and MuJoCo wants some for a revolute joint.
        kind = 'continuous' if joint.get('type') == 'revolute' else joint.get('type', '')
        bare = ElementTree.SubElement(robot, 'joint', name=joint.get('name', ''), type=kind)
        bare.extend(element for element in joint if element.tag in ('parent', 'child', 'origin', 'axis'))
    return ElementTree.tostring(robot, encoding='unicode')


def _frame_along(axis: Array) -> Array:
    """A rotation ``[3, 3]`` whose third column is the unit vector ``axis``."""
    first = np.cross(axis, np.eye(3)[int(np.argmin(np.abs(axis)))])
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(axis, first), axis], axis=1)


def _mujoco() -> ModuleType:
    """MuJoCo, imported only where a workspace is configured: control/ stays light elsewhere."""
    try:
        import mujoco
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise UrdfError(
            f'a workspace limit needs mujoco, which cannot be imported ({error}): install mujoco; on a machine without OpenGL set '
            'MUJOCO_GL=disable'
        ) from error
    module: ModuleType = mujoco
    return module


def _end(joint: ElementTree.Element, tag: str) -> str:
    """The ``parent`` or ``child`` link of a joint."""
    element = joint.find(tag)
    return '' if element is None else element.get('link', '')


def _number(element: ElementTree.Element, key: str, default: float, joint: str, path: str | Path) -> float:
    text = element.get(key)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UrdfError(f'{path}: <{element.tag}> of joint {joint!r} has {key} = {text!r}, which is not a number')
    return value


def _unknown(name: str, kind: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {near[0]!r}? ' if near else ''
    return f'{name!r} is no {kind} of the URDF; {hint}it has {", ".join(known) or "none"}'
