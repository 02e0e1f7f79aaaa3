"""Plays a bag, with its clock, to the policy node in dry run, and records what the node says: live replay.

ros2 launch vla_policy_ros replay.launch.py bag:=my_bag robot_file:=my_robot.yaml checkpoint:=my_checkpoint out:=live

Afterwards `vla-policy replay my_bag --robot ... --checkpoint ... --seed 1 --live live` asks again what the node was asked, and
compares.
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import EnvironmentVariable, LaunchConfiguration, ThisLaunchFileDir
from launch_ros.actions import Node

from vla_policy_ros.resources import robot_path, share_path
from vla_policy_ros.robot import load_robot

PASSED_ON = ('robot_file', 'checkpoint', 'params_file', 'seed', 'log_level')
RECORDED = ('/policy_node/chunk', '/policy_node/status')


def player(context: LaunchContext) -> list:
    """Whoever plays, once the node listens to its inputs; everything ends with the bag."""
    bag, rate = (LaunchConfiguration(name).perform(context) for name in ('bag', 'rate'))
    robot = load_robot(robot_path(LaunchConfiguration('robot_file').perform(context)))
    inputs = [camera.topic for camera in robot.cameras.values()] + [robot.state.topic]
    if LaunchConfiguration('player').perform(context) == 'rosbag2':
        # A node that does not listen yet misses the beginning, so rosbag2 waits a little before it plays.
        command = ['ros2', 'bag', 'play', bag, '--clock', '100', '--rate', rate, '--delay', '5']
        process = ExecuteProcess(cmd=command, output='screen')
    else:
        process = Node(
            package='vla_policy_ros',
            executable='bag_player',
            arguments=[bag, '--rate', rate, '--wait-for', *inputs],
            output='screen',
            emulate_tty=True,
        )
    return [process, RegisterEventHandler(OnProcessExit(target_action=process, on_exit=[Shutdown(reason='the bag has ended')]))]


def recorder(context: LaunchContext) -> list:
    """Records what the node says, where that is wanted."""
    out = LaunchConfiguration('out').perform(context)
    if not out:
        return []
    return [ExecuteProcess(cmd=['ros2', 'bag', 'record', '--use-sim-time', '-o', out, *RECORDED], output='log')]


def generate_launch_description() -> LaunchDescription:
    """The node through policy.launch.py, the player, the recorder."""
    profile = str(share_path('config/fastdds.xml'))
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource([ThisLaunchFileDir(), '/policy.launch.py']),
        launch_arguments={
            **{name: LaunchConfiguration(name) for name in PASSED_ON},
            'use_sim_time': 'true',
            'dry_run': 'true',
        }.items(),
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument('bag', description='Folder of a rosbag2 bag'),
            DeclareLaunchArgument('robot_file', description='Robot file (YAML): a path, or the name of a shipped one'),
            DeclareLaunchArgument('checkpoint', description='Folder of the checkpoint'),
            DeclareLaunchArgument(
                'params_file', default_value=str(share_path('config/policy.yaml')), description='Node parameters (YAML)'
            ),
            DeclareLaunchArgument('seed', default_value='1', description='Of the sampling noise'),
            DeclareLaunchArgument('rate', default_value='1.0', description='Speed relative to the recording'),
            DeclareLaunchArgument(
                'player',
                default_value='bag_player',
                choices=['bag_player', 'rosbag2'],
                description='Who plays: ours, which leaves controller commands out, or `ros2 bag play`, which plays everything',
            ),
            DeclareLaunchArgument('out', default_value='', description='Bag for what the node says (rosbag2); empty: none'),
            DeclareLaunchArgument('log_level', default_value='info', description='Log level of the policy node'),
            SetEnvironmentVariable(
                'FASTRTPS_DEFAULT_PROFILES_FILE', EnvironmentVariable('FASTRTPS_DEFAULT_PROFILES_FILE', default_value=profile)
            ),
            OpaqueFunction(function=recorder),
            policy,
            OpaqueFunction(function=player),
        ]
    )
