"""A robot file as tables for the operator: what the node will listen to, how vectors are ordered, what it will command.

Enters: a validated `Robot`. Leaves: text on a rich console. Any thread.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vla_policy_ros.robot import Camera, Robot


def print_robot(robot: Robot, path: Path, console: Console | None = None) -> None:
    """Print the resolved mapping of ``robot``, which was read from ``path``."""
    console = console or Console()
    console.print(f'[bold]{robot.name}[/bold]  {path}  [green]valid[/green]')
    for table in (_inputs(robot), _joints(robot), _controllers(robot)):
        console.print(table)
    action, timing = robot.action, robot.timing
    console.print(
        f'A chunk is {action.horizon} actions, {action.period:g} s apart: {action.horizon * action.period:.2f} s, '
        f'{action.representation}. Cameras may differ by {timing.max_camera_skew:g} s, '
        f'image and state by {timing.max_state_skew:g} s.'
    )
    if robot.workspace is not None:
        box = robot.workspace.box
        sides = ', '.join(f'{axis} {low:g} .. {high:g}' for axis, low, high in zip('xyz', box.lower, box.upper, strict=True))
        base = robot.workspace.base or 'the root of the URDF'
        where = f'{sides} m of {base} ({robot.workspace.urdf})'
        console.print(f'{robot.workspace.tip} stays {robot.workspace.margin:g} m inside {where}.')


def _table(title: str, *columns: str) -> Table:
    """An empty table that folds what is too long: a topic is useless when it is cut."""
    table = Table(title=title, title_justify='left')
    for column in columns:
        table.add_column(column, overflow='fold')
    return table


def _inputs(robot: Robot) -> Table:
    table = _table('Inputs', 'input', 'topic', 'type', 'oldest, s')
    for name, camera in robot.cameras.items():
        kind = 'sensor_msgs/Image' if camera.transport == 'raw' else 'sensor_msgs/CompressedImage'
        table.add_row(f'camera {name}', camera.topic, kind, f'{robot.timing.max_image_age:g}')
        table.add_row('', *_intrinsics(camera), '')
    table.add_row('state', robot.state.topic, 'sensor_msgs/JointState', f'{robot.timing.max_state_age:g}')
    table.add_row('instruction', robot.instruction.topic, 'std_msgs/String', '')
    return table


def _intrinsics(camera: Camera) -> tuple[str, str]:
    """Where the intrinsics of a camera come from, as topic and type."""
    if camera.camera_info is not None:
        return camera.camera_info, 'sensor_msgs/CameraInfo'
    if camera.K is not None:
        return f'fixed K for {camera.width}x{camera.height}', ''
    return 'uncalibrated: no rays', ''


def _joints(robot: Robot) -> Table:
    table = _table('Joints', 'joint', 'state', 'action', 'position', 'velocity', 'acceleration', 'jerk')
    names = [*robot.action.joints, *(joint for joint in robot.state.joints if joint not in robot.action.joints)]
    state = robot.state.names
    for joint in names:
        places = ', '.join(f'{state.index(f"{joint}.{field}")}' for field in robot.state.fields if f'{joint}.{field}' in state)
        if joint not in robot.action.joints:
            table.add_row(joint, places, '', '', '', '', '')
            continue
        limit = robot.limits[joint]
        span = f'{limit.position[0]:g} .. {limit.position[1]:g}'
        rates = (f'{limit.velocity:g}', f'{limit.acceleration:g}', '' if limit.jerk is None else f'{limit.jerk:g}')
        table.add_row(joint, places, str(robot.action.joints.index(joint)), span, *rates)
    return table


def _controllers(robot: Robot) -> Table:
    table = _table('Controllers', 'controller', 'type', 'command topic', 'state topic', 'joints', 'Hz')
    for name, controller in robot.controllers.items():
        joints = f'{len(controller.joints)}'
        table.add_row(
            name, controller.type, controller.topic, controller.state_topic or 'none', joints, f'{controller.update_rate:g}'
        )
    return table
