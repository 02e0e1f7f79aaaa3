"""Starts the simulated arm and the policy node on it, on simulated time, and gives the policy an instruction.

ros2 launch vla_policy_ros demo.launch.py instruction:='reach the red cube'
"""

from __future__ import annotations

import json

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import EnvironmentVariable, LaunchConfiguration, ThisLaunchFileDir
from launch_ros.actions import Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.parameter_descriptions import ParameterValue

from vla_policy_ros.resources import robot_path, share_path
from vla_policy_ros.robot import load_robot

PASSED_ON = ('robot_file', 'checkpoint', 'params_file', 'namespace', 'use_sim_time', 'autostart', 'dry_run', 'log_level')


def instruct(context: LaunchContext) -> list:
    """Publishes the instruction when the policy node, the only lifecycle node here, has become active; nothing if it is empty."""
    instruction = LaunchConfiguration('instruction').perform(context)
    if not instruction:
        return []
    topic = load_robot(robot_path(LaunchConfiguration('robot_file').perform(context))).instruction.topic
    # Three subscriptions (two of the policy node, one of the simulator). Several times, because a publisher that leaves at once may
    # be gone before a busy node has matched it; a repeated instruction changes nothing.
    command = ['ros2', 'topic', 'pub', '--times', '5', '--rate', '2', '--wait-matching-subscriptions', '3']
    command += ['--qos-durability', 'transient_local']
    publish = ExecuteProcess(cmd=[*command, topic, 'std_msgs/msg/String', json.dumps({'data': instruction})], output='log')
    return [RegisterEventHandler(OnStateTransition(goal_state='active', entities=[publish], handle_once=True))]


def generate_launch_description() -> LaunchDescription:
    """The simulator, the policy through policy.launch.py, the instruction."""
    profile = str(share_path('config/fastdds.xml'))
    simulator = Node(
        package='vla_policy_ros',
        executable='sim_node',
        parameters=[
            {
                'robot_file': ParameterValue(LaunchConfiguration('robot_file'), value_type=str),
                'seed': ParameterValue(LaunchConfiguration('seed'), value_type=int),
                'realtime_factor': ParameterValue(LaunchConfiguration('realtime_factor'), value_type=float),
            }
        ],
        output='screen',
        emulate_tty=True,
    )
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource([ThisLaunchFileDir(), '/policy.launch.py']),
        launch_arguments={name: LaunchConfiguration(name) for name in PASSED_ON}.items(),
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument('robot_file', default_value='tabletop', description='Robot file that the simulator can play'),
            DeclareLaunchArgument(
                'checkpoint', default_value=str(share_path('checkpoints') / 'tabletop'), description='Folder of the checkpoint'
            ),
            DeclareLaunchArgument(
                'params_file', default_value=str(share_path('config/policy.yaml')), description='Node parameters (YAML)'
            ),
            DeclareLaunchArgument('instruction', default_value='', description='Sentence for the policy; empty to give none yet'),
            DeclareLaunchArgument('seed', default_value='7', description='Which scene'),
            DeclareLaunchArgument('realtime_factor', default_value='1.0', description='Simulated seconds per second, at most'),
            DeclareLaunchArgument('namespace', default_value='', description='Namespace of the policy node'),
            DeclareLaunchArgument(
                'use_sim_time', default_value='true', choices=['true', 'false'], description='The policy takes the time from /clock'
            ),
            DeclareLaunchArgument('autostart', default_value='true', description='Configure and activate the policy node'),
            DeclareLaunchArgument('dry_run', default_value='', description='Send nothing to the arm'),
            DeclareLaunchArgument('log_level', default_value='info', description='Log level of the policy node'),
            SetEnvironmentVariable(
                'FASTRTPS_DEFAULT_PROFILES_FILE', EnvironmentVariable('FASTRTPS_DEFAULT_PROFILES_FILE', default_value=profile)
            ),
            OpaqueFunction(function=instruct),
            simulator,
            policy,
        ]
    )
