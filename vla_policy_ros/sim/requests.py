"""An episode as text, so that a process can ask the simulator of another process for it.

``{"task": "reach", "seed": 7, "conditions": {...}}``, where the conditions may be left out or name only what is not the default.
Enters and leaves: such texts, `Episode`s. Pure functions, any thread.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from vla_policy_ros.sim.scene import Variation
from vla_policy_ros.sim.tasks import TASKS, Conditions, Episode, Task


def episode_request(task: str, seed: int, conditions: Conditions) -> str:
    """The text that asks for an episode."""
    return json.dumps({'task': task, 'seed': seed, 'conditions': asdict(conditions)})


def requested_episode(text: str) -> tuple[Task, Episode]:
    """The episode that a text asks for. Raises ValueError with the reason where it asks for none."""
    try:
        asked = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{text!r} is no JSON: {error}') from error
    if not isinstance(asked, dict) or not {'task', 'seed'} <= set(asked) <= {'task', 'seed', 'conditions'}:
        raise ValueError(f'{text!r} must be an object with task, seed and perhaps conditions')
    if asked['task'] not in TASKS:
        raise ValueError(f'task {asked["task"]!r} is unknown; choose among {", ".join(TASKS)}')
    if type(asked['seed']) is not int or asked['seed'] < 0:
        raise ValueError(f'seed is {asked["seed"]!r}; it must be a whole number, not negative')
    task = TASKS[asked['task']]
    return task, task.sample(asked['seed'], _conditions(asked.get('conditions', {})))


def _conditions(given: Any) -> Conditions:
    try:
        values = dict(given)
        if 'scene' in values:
            values['scene'] = Variation(**values['scene'])
        return Conditions(**values)
    except TypeError as error:
        raise ValueError(f'conditions {given!r}: {error}') from error
