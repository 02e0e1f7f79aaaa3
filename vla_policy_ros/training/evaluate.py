"""``python -m vla_policy_ros.training.evaluate``: closed-loop success of a checkpoint in the simulator, without ROS.

Per seed one fresh scene and one named object. The policy looks, answers a chunk, and the arm's drives follow the first part of it
while the physics runs; then it looks again. Success is the tool within 3 cm of the point above the object at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vla_policy_ros.policy.policy import Policy
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.sim.instructions import instruction_for
from vla_policy_ros.sim.scene import JITTER, NOMINAL
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, Observation

CONTROLLER_PERIOD = 0.01
FIRST_SEED = 500_000


@dataclass(frozen=True)
class Episode:
    """How one episode ended: the sentence, the final distance to the named object's goal (m), and the nearest object."""

    seed: int
    instruction: str
    distance: float
    nearest: str
    target: str
    shared_colour: bool


def run_episode(
    policy: Policy, robot: Robot, world: TabletopWorld, seed: int, *, seconds: float, executed: int, jitter: bool
) -> Episode:
    """One closed-loop episode; ``executed`` actions of each chunk are carried out before the next look."""
    world.reset(seed, JITTER if jitter else NOMINAL)
    rng = np.random.default_rng([seed, 7])
    target = world.objects[int(rng.integers(len(world.objects)))]
    instruction = instruction_for(target, world.objects, rng)
    columns = [world.joint_names.index(joint) for joint in robot.action.joints]
    ticks = round(robot.action.period / CONTROLLER_PERIOD)
    commanded = world.joint_state()[0]
    for _ in range(round(seconds / (executed * robot.action.period))):
        chunk = policy.infer(observe(world, robot, instruction))
        for action in chunk.actions[:executed]:
            goal = commanded.copy()
            goal[columns] = action
            velocity = (goal - commanded) / robot.action.period
            for tick in range(1, ticks + 1):
                world.set_position_targets(commanded + (goal - commanded) * tick / ticks, velocity)
                world.step(CONTROLLER_PERIOD)
            commanded = goal
    nearest = min(world.objects, key=lambda spec: world.distance(spec.name)).name
    shared = sum(spec.colour == target.colour for spec in world.objects) > 1
    return Episode(seed, instruction, world.distance(target.name), nearest, target.name, shared)


def observe(world: TabletopWorld, robot: Robot, instruction: str) -> Observation:
    """What the node would see now."""
    position, velocity = world.joint_state()
    fields = {'position': position, 'velocity': velocity}
    columns = [world.joint_names.index(joint) for joint in robot.state.joints]
    state: NDArray[np.float64] = np.concatenate([fields[field][columns] for field in robot.state.fields])
    stamp = world.time_ns + NS_PER_S
    return Observation(stamp, {name: world.render(name) for name in robot.camera_names}, state, stamp, instruction)


def evaluate(policy: Policy, robot: Robot, seeds: range, *, seconds: float, executed: int, jitter: bool) -> Iterator[Episode]:
    """Episodes of all seeds, one after the other."""
    world = TabletopWorld()
    try:
        for seed in seeds:
            yield run_episode(policy, robot, world, seed, seconds=seconds, executed=executed, jitter=jitter)
    finally:
        world.close()


def summarise(episodes: list[Episode]) -> dict[str, float | int]:
    """Counts and distances of finished episodes."""
    distance = np.array([episode.distance for episode in episodes])
    wrong = [episode for episode in episodes if episode.nearest != episode.target and episode.distance > 0.03]
    shared = [episode for episode in episodes if episode.shared_colour]
    return {
        'episodes': len(episodes),
        'success_3cm': float(np.mean(distance < 0.03)),
        'success_5cm': float(np.mean(distance < 0.05)),
        'median_distance_m': float(np.median(distance)),
        'p90_distance_m': float(np.quantile(distance, 0.9)),
        'nearer_to_another_object': len(wrong),
        'target_shares_its_colour': len(shared),
        'success_3cm_shared_colour': float(np.mean([e.distance < 0.03 for e in shared])) if shared else float('nan'),
    }


def main() -> None:
    """Print one line per episode and a summary; optionally write both as JSON."""
    parser = argparse.ArgumentParser(prog='python -m vla_policy_ros.training.evaluate', description=__doc__)
    parser.add_argument('--robot', type=Path, required=True, help='robot file')
    parser.add_argument('--checkpoint', type=Path, required=True, help='checkpoint folder')
    parser.add_argument('--episodes', type=int, default=100)
    parser.add_argument('--first-seed', type=int, default=FIRST_SEED)
    parser.add_argument('--seconds', type=float, default=4.0, help='simulated length of an episode')
    parser.add_argument('--executed', type=int, default=8, help='actions carried out per chunk')
    parser.add_argument('--steps', type=int, help="integration steps (default: the checkpoint's)")
    parser.add_argument('--no-jitter', action='store_true', help='nominal camera pose and light')
    parser.add_argument('--json', type=Path, help='write the result here')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    robot = load_robot(robot_path(arguments.robot))
    policy = Policy.load(arguments.checkpoint, robot, num_steps=arguments.steps, seed=0)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.episodes)
    episodes = []
    for episode in evaluate(
        policy, robot, seeds, seconds=arguments.seconds, executed=arguments.executed, jitter=not arguments.no_jitter
    ):
        episodes.append(episode)
        print(f'{episode.seed} {episode.distance * 100:6.1f} cm  {episode.instruction!r} (nearest: {episode.nearest})', flush=True)
    summary = summarise(episodes)
    print(json.dumps(summary, indent=1))
    if arguments.json:
        rows = [vars(episode) for episode in episodes]
        arguments.json.write_text(json.dumps({'summary': summary, 'episodes': rows}, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
