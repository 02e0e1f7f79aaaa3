"""Sentences: writing one that names an object of a scene, and finding the object that a sentence names.

Enters: the objects of a scene and either a random generator or a sentence. Leaves: a sentence, or the object with the reason
when there is none. Pure functions, any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_policy_ros.sim.scene import COLOURS, SHAPES, ObjectSpec

TEMPLATES = (
    'reach the {}',
    'reach for the {}',
    'go to the {}',
    'move to the {}',
    'move the arm to the {}',
    'touch the {}',
    'point at the {}',
)

_SHAPE_WORDS = {
    'cube': 'cube', 'block': 'cube', 'box': 'cube',
    'ball': 'ball', 'sphere': 'ball',
    'cylinder': 'cylinder', 'can': 'cylinder',
}  # fmt: skip
_FULL_NAME_SHARE = 0.7


@dataclass(frozen=True)
class Target:
    """The object that a sentence names, or None and the ``reason`` in words for the operator."""

    object: ObjectSpec | None
    reason: str = ''


def instruction_for(target: ObjectSpec, objects: Sequence[ObjectSpec], rng: np.random.Generator) -> str:
    """A sentence that names ``target`` and no other of ``objects``.

    Mostly colour and shape; where one of the two is unique in the scene, sometimes that word alone.
    """
    phrases = [target.name]
    if sum(spec.colour == target.colour for spec in objects) == 1:
        phrases.append(f'{target.colour} object')
    if sum(spec.shape == target.shape for spec in objects) == 1:
        phrases.append(target.shape)
    full = len(phrases) == 1 or rng.random() < _FULL_NAME_SHARE
    phrase = phrases[0] if full else phrases[int(rng.integers(1, len(phrases)))]
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(phrase)


def parse_instruction(instruction: str, objects: Sequence[ObjectSpec]) -> Target:
    """Which of ``objects`` a sentence names by colour and shape words; a sentence that fits none or several names nothing."""
    words = re.findall(r'[a-z]+', instruction.lower())
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
