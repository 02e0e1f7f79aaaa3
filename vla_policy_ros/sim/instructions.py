"""Sentences: writing one that names an object of a scene, and finding the object that a sentence names.

Enters: the objects of a scene and either a random generator or a sentence. Leaves: a sentence, or the object with the reason
when there is none. Pure functions, any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_policy_ros.sim.scene import COLOURS, SHAPES, UNNAMED, ObjectSpec

TEMPLATES = (
    'reach the {}',
    'reach for the {}',
    'reach over to the {}',
    'go to the {}',
    'go over to the {}',
    'move to the {}',
    'move above the {}',
    'move the arm to the {}',
    'move the gripper to the {}',
    'bring the gripper above the {}',
    'touch the {}',
    'please touch the {}',
    'point at the {}',
    'now point to the {}',
    'the {}',
)
HELD_OUT_TEMPLATES = (
    'go and touch the {}',
    'please go to the {} now',
    'take the arm over to the {}',
    'can you reach the {}',
    'stop above the {}',
    'hand to the {} please',
)
"""Sentences that are never trained, for the question whether a policy follows a sentence it has not heard."""

NAMINGS = ('any', 'full', 'colour', 'shape')

_SHAPE_WORDS = {
    'cube': 'cube', 'block': 'cube', 'box': 'cube',
    'ball': 'ball', 'sphere': 'ball',
    'cylinder': 'cylinder', 'can': 'cylinder',
}  # fmt: skip
_FULL_NAME_SHARE = 0.55


@dataclass(frozen=True)
class Target:
    """The object that a sentence names, or None and the ``reason`` in words for the operator."""

    object: ObjectSpec | None
    reason: str = ''


def can_name(target: ObjectSpec, objects: Sequence[ObjectSpec], naming: str) -> bool:
    """Whether ``naming`` (``full``, ``colour`` or ``shape``) tells ``target`` from the others. ``any`` always does."""
    if naming == 'colour':
        return target.colour != UNNAMED and sum(spec.colour == target.colour for spec in objects) == 1
    if naming == 'shape':
        return sum(spec.shape == target.shape for spec in objects) == 1
    return True


def instruction_for(
    target: ObjectSpec,
    objects: Sequence[ObjectSpec],
    rng: np.random.Generator,
    *,
    naming: str = 'any',
    templates: Sequence[str] = TEMPLATES,
) -> str:
    """A sentence that names ``target`` and no other of ``objects`` (twins share their name).

    Args:
        naming: ``full`` says colour and shape, ``colour`` or ``shape`` only that word; ``any`` draws among those that are enough,
            mostly the full name.
        templates: sentences with a place for the name.

    Raises:
        ValueError: the naming is unknown, or does not tell the target from the others.
    """
    if naming not in NAMINGS:
        raise ValueError(f'naming is {naming!r}; it must be one of {", ".join(NAMINGS)}')
    if not can_name(target, objects, naming):
        raise ValueError(f'the {naming} of {target.name!r} does not tell it from {", ".join(spec.name for spec in objects)}')
    if naming == 'any':
        enough = [word for word in ('colour', 'shape') if can_name(target, objects, word)]
        naming = 'full' if not enough or rng.random() < _FULL_NAME_SHARE else enough[int(rng.integers(len(enough)))]
    phrase = {'full': target.name, 'colour': f'{target.colour} object', 'shape': target.shape}[naming]
    return templates[int(rng.integers(len(templates)))].format(phrase)


def parse_instruction(instruction: str, objects: Sequence[ObjectSpec]) -> Target:
    """Which of ``objects`` a sentence names by colour and shape words; a sentence that fits none or several names nothing."""
    words = re.findall(r'[a-z]+', re.sub(r'\bcan you\b', '', instruction.lower()))
    colours = sorted({word for word in words if word in COLOURS})
    shapes = sorted({shape for word in words if (shape := _SHAPE_WORDS.get(word.removesuffix('s')))})
    scene = ', '.join(spec.name for spec in objects)
    if not colours and not shapes:
        return Target(None, f'{instruction!r} names no colour ({", ".join(COLOURS)}) and no shape ({", ".join(SHAPES)})')
    if len(colours) > 1 or len(shapes) > 1:
        return Target(None, f'{instruction!r} is ambiguous: it names {" and ".join(colours if len(colours) > 1 else shapes)}')
    matches = [o for o in objects if (not colours or o.colour == colours[0]) and (not shapes or o.shape == shapes[0])]
    wanted = ' '.join(colours + shapes)
    if not matches:
        return Target(None, f'{instruction!r} names a {wanted}, but the scene has {scene}')
    if len(matches) > 1:
        return Target(None, f'{instruction!r} is ambiguous: {wanted} fits {" and ".join(o.name for o in matches)}')
    return Target(matches[0])
