"""Names of the conditions under which a task is evaluated, as they are written on a command line.

``nominal``, or parts joined by ``+``: ``camera=0.025+shape_only`` moves the camera and names objects by their shape alone.
Enters: such a name. Leaves: `Conditions` of the task suite. Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vla_policy_ros.sim.scene import JITTER
from vla_policy_ros.sim.tasks import Conditions

NOMINAL = 'nominal'

_FLAGS: dict[str, Callable[[Conditions], Conditions]] = {
    'held_out_phrasings': lambda given: replace(given, phrasing='held_out'),
    'held_out_kinds': lambda given: replace(given, scene=replace(given.scene, kinds='held_out')),
    'full_name': lambda given: replace(given, naming='full'),
    'colour_only': lambda given: replace(given, naming='colour'),
    'shape_only': lambda given: replace(given, naming='shape'),
    'same_colour': lambda given: replace(given, scene=replace(given.scene, shared_colour=True)),
    'distinct_colours': lambda given: replace(given, scene=replace(given.scene, shared_colour=False)),
    'plain': lambda given: replace(given, scene=replace(given.scene, surroundings=False)),
    'trained': lambda given: replace(given, scene=replace(given.scene, camera=JITTER.camera)),
}

# Of these, one at a time: they set the same thing.
_ALTERNATIVES = (
    {'full_name', 'colour_only', 'shape_only'},
    {'same_colour', 'distinct_colours'},
    {'camera', 'trained'},
)

HELP = (
    f'{NOMINAL}, or of camera=METRES (moved uniformly by up to so much per axis), {", ".join(_FLAGS)}; several joined by +. '
    'trained moves the camera as in training, plain has one light and one table.'
)


def conditions_of(name: str) -> Conditions:
    """The conditions that a variation's name means. Raises ValueError where a part is unknown, twice there or out of range."""
    conditions = Conditions()
    if name == NOMINAL:
        return conditions
    parts = name.split('+')
    keys = [part.partition('=')[0] for part in parts]
    same = [group for group in _ALTERNATIVES if len(group & set(keys)) > 1]
    if same:
        raise ValueError(f'variation {name!r} joins {" and ".join(sorted(same[0] & set(keys)))}, which exclude one another')
    if len(set(keys)) < len(keys):
        raise ValueError(f'variation {name!r} says something twice')
    for part in parts:
        if part.startswith('camera='):
            conditions = replace(conditions, scene=replace(conditions.scene, camera='shifted', camera_shift=_metres(name, part)))
        elif part in _FLAGS:
            conditions = _FLAGS[part](conditions)
        else:
            raise ValueError(f'variation {name!r} has the unknown part {part!r}; use {HELP}')
    return conditions


def _metres(name: str, part: str) -> float:
    try:
        return float(part.partition('=')[2])
    except ValueError:
        raise ValueError(f'variation {name!r}: {part!r} needs a number of metres, such as camera=0.025') from None
