"""Starts the policy node and, unless told otherwise, configures and activates it.

ros2 launch vla_policy_ros policy.launch.py robot_file:=my_robot.yaml checkpoint:=my_checkpoint dry_run:=true
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, LogInfo, OpaqueFunction, RegisterEventHandler, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

from vla_policy_ros.resources import robot_path, share_path


def policy_node(context: LaunchContext) -> list:
    """The node and the events that bring it up. Arguments left empty keep what the parameter file says."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ('checkpoint', 'dry_run', 'device', 'seed')}
    overrides: dict[str, object] = {name: value for name, value in given.items() if value}
    if given['dry_run']:
        overrides['dry_run'] = ParameterValue(LaunchConfiguration('dry_run'), value_type=bool)
    if given['seed']:
        overrides['seed'] = ParameterValue(LaunchConfiguration('seed'), value_type=int)
    namespace = LaunchConfiguration('namespace').perform(context)
    logger = '.'.join([*(part for part in namespace.split('/') if part), 'policy_node'])
    node = LifecycleNode(
        package='vla_policy_ros',
        executable='policy_node',
        name='policy_node',
        namespace=namespace,
        parameters=[
            LaunchConfiguration('params_file'),
            {
                'robot_file': str(robot_path(LaunchConfiguration('robot_file').perform(context))),
                'use_sim_time': ParameterValue(LaunchConfiguration('use_sim_time'), value_type=bool),
                'autostart': False,  # the events below do it, so that launch sees every transition
                **overrides,
            },
        ],
        ros_arguments=['--log-level', [f'{logger}:=', LaunchConfiguration('log_level')]],
        output='screen',
        emulate_tty=True,
    )
    autostart = IfCondition(LaunchConfiguration('autostart'))
    return [
        # Registered before the node starts, so that no transition is missed.
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node,
                start_state='configuring',
                goal_state='inactive',
                entities=[_change_state(node, Transition.TRANSITION_ACTIVATE)],
            ),
            condition=autostart,
        ),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node,
                start_state='configuring',
                goal_state='unconfigured',
                entities=[LogInfo(msg='policy_node could not be configured: see its message above, mend it, and configure again')],
            ),
        ),
        node,
        EmitEvent(event=_change_state(node, Transition.TRANSITION_CONFIGURE).event, condition=autostart),
    ]


def _change_state(node: LifecycleNode, transition: int) -> EmitEvent:
    return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))


def generate_launch_description() -> LaunchDescription:
    """Arguments, the environment of Fast DDS, the node."""
    profile = str(share_path('config/fastdds.xml'))
    return LaunchDescription(
        [
            DeclareLaunchArgument('robot_file', description='Robot file (YAML): a path, or the name of a shipped one'),
            DeclareLaunchArgument('checkpoint', description='Folder of the checkpoint'),
            DeclareLaunchArgument(
                'params_file', default_value=str(share_path('config/policy.yaml')), description='Node parameters (YAML)'
            ),
            DeclareLaunchArgument('namespace', default_value='', description='Namespace of the node'),
            DeclareLaunchArgument(
                'use_sim_time', default_value='false', choices=['true', 'false'], description='Take the time from /clock'
            ),
            DeclareLaunchArgument(
                'autostart', default_value='true', choices=['true', 'false'], description='Configure and activate the node'
            ),
            DeclareLaunchArgument(
                'dry_run',
                default_value='',
                choices=['', 'true', 'false'],
                description='Plan and preview but send nothing to the controllers; empty keeps the value of the parameter file',
            ),
            DeclareLaunchArgument(
                'device', default_value='', description='torch device; empty keeps the value of the parameter file'
            ),
            DeclareLaunchArgument(
                'seed', default_value='', description='Of the sampling noise; empty keeps the value of the parameter file'
            ),
            DeclareLaunchArgument(
                'log_level', default_value='info', choices=['debug', 'info', 'warn', 'error'], description='Log level of the node'
            ),
            # Raw images need more shared memory than Fast DDS takes by itself; every process on the topics needs the profile.
            SetEnvironmentVariable(
                'FASTRTPS_DEFAULT_PROFILES_FILE', EnvironmentVariable('FASTRTPS_DEFAULT_PROFILES_FILE', default_value=profile)
            ),
            OpaqueFunction(function=policy_node),
        ]
    )
