"""The tasks of the tabletop: what is asked, how the expert does it, how success is judged.

Enters: a task's name, a seed, conditions. Leaves: episodes, expert steps and outcomes. Any one thread per `ArmKinematics`.
"""

from vla_policy_ros.sim.tasks.base import TRAINING, Conditions, Episode, Outcome, Task, TaskState
from vla_policy_ros.sim.tasks.pick import Pick, Place
from vla_policy_ros.sim.tasks.push import Push
from vla_policy_ros.sim.tasks.reach import Reach, ReachAny, ReachShape

TASKS: dict[str, Task] = {task.name: task for task in (Reach(), ReachAny(), ReachShape(), Push(), Pick(), Place())}
"""All tasks by name."""

__all__ = ['TASKS', 'TRAINING', 'Conditions', 'Episode', 'Outcome', 'Task', 'TaskState']
