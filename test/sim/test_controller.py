"""The robot around the world executes what a controller would, refuses what it would, and counts both exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.sim.controller import START_NS, CommandRecord, SimulatedRobot
from vla_policy_ros.sim.dataset import RobotMismatch
from vla_policy_ros.sim.expert import ArmKinematics, expert_chunk
from vla_policy_ros.sim.requests import episode_request, requested_episode
from vla_policy_ros.sim.scene import Variation
from vla_policy_ros.sim.tasks import TASKS, Conditions
from vla_policy_ros.types import NS_PER_S, ActionChunk

ROBOT = load_robot(Path(__file__).parents[2] / 'config/robots/tabletop.yaml')
JOINTS = ROBOT.action.joints
TOPIC = 'arm'


@pytest.fixture
def simulated():
    simulated = SimulatedRobot(ROBOT, seed=5)
    yield simulated
    simulated.world.close()


def drive_with_expert(simulated, seconds, kinematics, replan_s=0.2):
    """A policy in the loop that answers like the expert; returns the time of the last trajectory sent."""
    planner = TrajectoryPlanner(JointLimits.from_robot(ROBOT), Emission.for_controller(100.0))
    commanded = CommandedMotion.from_rest(JOINTS, simulated.world.joint_state()[0], simulated.time_ns)
    end_ns, replan_ns, due_ns = simulated.time_ns + round(seconds * NS_PER_S), round(replan_s * NS_PER_S), simulated.time_ns
    while simulated.time_ns < end_ns:
        now_ns = simulated.time_ns
        if now_ns >= due_ns:
            due_ns += replan_ns
            goal = simulated.world.goal_point(simulated.target.object.name)
            actions = expert_chunk(kinematics, simulated.world.joint_state()[0], goal, ROBOT.action.horizon, ROBOT.action.period)
            period_ns = ROBOT.action.period_ns
            chunk = ActionChunk(now_ns + period_ns, period_ns, JOINTS, actions, now_ns, simulated.instruction)
            plan = planner.plan(chunk, now_ns, commanded)
            assert plan.rejection is None, plan.reason
            commanded.accept(plan.trajectory)
            message = TrajectoryMessage.from_trajectory(plan.trajectory, planner.emission.header_stamp_ns(plan.trajectory))
            assert simulated.receive(TOPIC, message).accepted
        simulated.tick()


def test_expert_through_planner_and_controller_reaches_every_object_within_all_limits(simulated):
    kinematics = ArmKinematics()
    for spec in simulated.world.objects:
        assert simulated.set_instruction(f'reach the {spec.name}').object == spec
        drive_with_expert(simulated, 5.0, kinematics)
        report = simulated.report()
        assert report['success'] and report['distance_m'] < 0.02, (spec.name, report['distance_m'])
    assert report['trajectories'] | {'rejections': {}} == {
        'received': 75, 'accepted': 75, 'rejected': 0, 'overwritten': 0, 'rejections': {}, 'last_rejection': '',
    }  # fmt: skip
    assert 0.2 < report['commands']['max_step_ratio'] <= 1.0
    assert report['drive_faults'] == 0
    json.dumps(report)


def test_arm_comes_to_rest_within_the_deceleration_limit_when_the_sender_dies(simulated):
    simulated.set_instruction(f'reach the {simulated.world.objects[0].name}')
    drive_with_expert(simulated, 1.0, ArmKinematics())
    moving = simulated.report()['since_last_trajectory']
    assert moving['speed'] > 0.2 and not moving['at_rest']
    for _ in range(300):
        simulated.tick()
    after = simulated.report()['since_last_trajectory']
    assert after['at_rest'] and after['elapsed_s'] >= 3.0 and 0.1 < after['moved_for_s'] < 2.5
    assert 0.0 < after['max_acceleration_ratio'] <= 1.0
    assert np.abs(simulated.world.joint_state()[1]).max() < 0.01


def test_rest_after_start_holds_the_arm(simulated):
    start = simulated.world.joint_state()[0]
    for _ in range(100):
        simulated.tick()
    assert simulated.time_ns == START_NS + NS_PER_S
    assert np.abs(simulated.world.joint_state()[0] - start).max() < 1e-3
    assert simulated.report()['commands']['max_step_rad'] < 1e-12


@pytest.mark.parametrize(
    ('points', 'names', 'rule'),
    [
        ([], JOINTS, 'NO_POINTS'),
        ([TrajectoryPoint(NS_PER_S, np.zeros(7))], (*JOINTS[:6], 'elbow'), 'UNKNOWN_JOINT'),
        ([TrajectoryPoint(NS_PER_S, np.zeros(7), np.ones(7))], JOINTS, 'MOVING_END'),
        ([TrajectoryPoint(NS_PER_S, np.zeros(6))], JOINTS, 'FIELD_SIZE'),
    ],
)
def test_a_bad_trajectory_is_refused_counted_and_not_executed(simulated, points, names, rule):
    start = simulated.world.joint_state()[0]
    assert not simulated.receive(TOPIC, TrajectoryMessage(names, points)).accepted
    for _ in range(20):
        simulated.tick()
    trajectories = simulated.report()['trajectories']
    assert trajectories['rejections'] == {rule: 1} and trajectories['rejected'] == 1 and trajectories['accepted'] == 0
    assert 'rejected' in trajectories['last_rejection']
    assert np.abs(simulated.world.joint_state()[0] - start).max() < 1e-3


def test_a_step_that_a_controller_would_execute_shows_in_the_report(simulated):
    q = simulated.world.joint_state()[0]
    simulated.receive(TOPIC, TrajectoryMessage(JOINTS, [TrajectoryPoint(0, q + np.eye(7)[3] * 0.1)]))
    for _ in range(5):
        simulated.tick()
    commands = simulated.report()['commands']
    assert commands['max_step_rad'] == pytest.approx(0.1, abs=1e-3)
    assert commands['max_step_ratio'] == pytest.approx(0.1 / 0.015, rel=0.02)
    assert commands['joints'][JOINTS[3]]['max_step'] == commands['max_step_rad']
    assert commands['joints'][JOINTS[0]]['max_step'] < 1e-9


def test_nan_that_the_controller_passes_on_is_stopped_by_the_drives(simulated):
    q = simulated.world.joint_state()[0]
    points = [TrajectoryPoint(NS_PER_S // 10, np.full(7, np.nan)), TrajectoryPoint(NS_PER_S, q)]
    assert simulated.receive(TOPIC, TrajectoryMessage(JOINTS, points)).accepted
    for _ in range(50):
        simulated.tick()
    report = simulated.report()
    assert report['drive_faults'] == 1
    assert report['trajectories']['accepted'] == 1
    assert np.abs(simulated.world.joint_state()[0] - q).max() < 1e-3
    simulated.receive(TOPIC, TrajectoryMessage(JOINTS, [TrajectoryPoint(NS_PER_S // 2, q + 0.05)]))
    for _ in range(80):
        simulated.tick()
    assert np.abs(simulated.world.joint_state()[0] - q - 0.05).max() < 2e-3


def test_next_scene_keeps_arm_time_and_instruction(simulated):
    simulated.set_instruction('reach the purple cone')
    for _ in range(10):
        simulated.tick()
    before, stamp = simulated.world.joint_state()[0], simulated.time_ns
    scene = simulated.lay_out_next_scene()
    assert scene.seed > 5 and simulated.world.objects == scene.objects
    assert np.array_equal(simulated.world.joint_state()[0], before) and simulated.time_ns == stamp
    tool = simulated.world.tcp()
    assert all(np.hypot(o.x - tool[0], o.y - tool[1]) > 0.1 for o in scene.objects)
    simulated.tick()
    assert simulated.report()['commands']['max_step_rad'] < 1e-12


def test_the_instruction_is_judged_against_the_scene(simulated):
    assert simulated.report()['target'] is None and simulated.report()['target_reason'] == 'no instruction yet'
    name = simulated.world.objects[1].name
    simulated.set_instruction(f'touch the {name}')
    report = simulated.report()
    assert report['target'] == name and not report['success']
    assert report['distance_m'] == pytest.approx(np.linalg.norm(simulated.world.tcp() - simulated.world.goal_point(name)))
    simulated.set_instruction('make coffee')
    assert simulated.report()['distance_m'] is None and 'names no colour' in simulated.report()['target_reason']


def test_two_controllers_drive_their_own_joints():
    data = ROBOT.model_dump()
    arm = data['controllers'].pop('arm')
    data['controllers']['upper'] = arm | {'topic': '/upper/joint_trajectory', 'state_topic': None, 'joints': JOINTS[:4]}
    data['controllers']['lower'] = arm | {'topic': '/lower/joint_trajectory', 'state_topic': None, 'joints': JOINTS[:3:-1]}
    simulated = SimulatedRobot(Robot.model_validate(data), seed=0)
    q = simulated.world.joint_state()[0]
    target = q[:3:-1] + np.array([0.1, 0.0, 0.0])
    simulated.receive('lower', TrajectoryMessage(JOINTS[:3:-1], [TrajectoryPoint(NS_PER_S // 2, target)]))
    for _ in range(80):
        simulated.tick()
    assert np.allclose(simulated.world.joint_state()[0] - q, [0, 0, 0, 0, 0, 0, 0.1], atol=2e-3)


def test_update_rates_that_physics_cannot_keep_are_refused():
    data = ROBOT.model_dump()
    data['controllers']['arm']['update_rate'] = 300.0
    with pytest.raises(RobotMismatch, match=r'300\.0 Hz is not a whole number of physics steps'):
        SimulatedRobot(Robot.model_validate(data), seed=0)


def test_command_record_counts_what_is_commanded():
    record = CommandRecord(np.zeros(2), np.array([1.0, 2.0]), np.array([10.0, 10.0]), 0.01)
    for value in (0.001, 0.003, 0.006, 0.006):
        record.add(np.array([value, 0.0]))
    report = record.report(('a', 'b'))
    assert report['ticks'] == 4
    assert report['max_step_rad'] == pytest.approx(0.003) and report['max_step_ratio'] == pytest.approx(0.3)
    assert report['joints']['a']['max_velocity'] == pytest.approx(0.3)
    assert report['joints']['a']['max_acceleration'] == pytest.approx(30.0)  # from 0.3 rad/s to rest in one tick
    since = record.report_since_trajectory()
    assert since['at_rest'] and since['moved_for_s'] == pytest.approx(0.03)
    assert since['max_acceleration_ratio'] == pytest.approx(3.0)  # the stop is the fourth tick
    record.restart(np.array([1.0, 0.0]))
    record.add(np.array([1.0, 0.0]))
    assert record.report(('a', 'b'))['max_step_rad'] == pytest.approx(0.003)


def test_an_episode_begins_at_its_start_while_time_goes_on(simulated):
    task = TASKS['reach']
    kinematics = ArmKinematics()
    simulated.set_instruction(f'reach the {simulated.world.objects[0].name}')
    drive_with_expert(simulated, 1.0, kinematics)
    before, counted = simulated.time_ns, simulated.report()['trajectories']
    assert simulated.report()['episode'] is None and counted['accepted'] > 0
    episode = task.sample(77, Conditions())
    simulated.begin_episode(task, episode)
    assert simulated.time_ns == before
    assert np.allclose(simulated.world.joint_state()[0], episode.scene.start)
    report = simulated.report()
    assert report['episode']['begun_s'] == report['simulated_s'] == (before - START_NS) / NS_PER_S
    assert report['trajectories'] == counted and report['episode']['task'] == 'reach' and report['episode']['success'] is False
    for _ in range(50):
        simulated.tick()
    assert simulated.time_ns == before + 50 * simulated.period_ns
    assert np.abs(simulated.world.joint_state()[0] - episode.scene.start).max() < 2e-3, 'the old trajectory is forgotten'
    simulated.set_instruction(episode.instruction)
    drive_with_expert(simulated, 4.0, kinematics)
    judged = simulated.report()['episode']
    assert judged['success'] and judged['error'] < 0.02 and judged['failure'] == ''
    assert simulated.report()['commands']['max_step_ratio'] <= 1.0
    simulated.lay_out_next_scene()
    assert simulated.report()['episode'] is None


def test_an_episode_that_is_asked_for_as_text_is_the_one_that_is_drawn():
    conditions = Conditions(scene=Variation(camera='shifted', surroundings=True), phrasing='held_out', naming='full')
    task, episode = requested_episode(episode_request('reach', 123, conditions))
    drawn = TASKS['reach'].sample(123, conditions)
    assert task is TASKS['reach'] and episode.instruction == drawn.instruction and episode.targets == drawn.targets
    assert episode.scene.objects == drawn.scene.objects and (episode.scene.camera_position == drawn.scene.camera_position).all()
    assert requested_episode('{"task": "reach", "seed": 5}')[1].instruction == TASKS['reach'].sample(5, Conditions()).instruction


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('reach', 'no JSON'),
        ('[]', 'must be an object'),
        ('{"task": "reach"}', 'must be an object'),
        ('{"task": "reach", "seed": 1, "speed": 2}', 'must be an object'),
        ('{"task": "juggle", "seed": 1}', 'choose among reach'),
        ('{"task": "reach", "seed": -1}', 'seed is -1'),
        ('{"task": "reach", "seed": 1.5}', 'seed is 1.5'),
        ('{"task": "reach", "seed": 1, "conditions": {"colour": "red"}}', 'colour'),
        ('{"task": "reach", "seed": 1, "conditions": {"scene": {"camera": "upside down"}}}', 'camera'),
        ('{"task": "reach", "seed": 1, "conditions": 3}', 'conditions 3'),
    ],
)
def test_a_text_that_asks_for_no_episode_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        requested_episode(text)
