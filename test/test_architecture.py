"""The rooms of the package keep to what each may import, and only the rooms that own a clock read one.

Every import counts, also one inside a function or under TYPE_CHECKING: a room that needs a name of another depends on it.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = 'vla_policy_ros'

ROS = {
    'rclpy', 'rcl_interfaces', 'builtin_interfaces', 'control_msgs', 'diagnostic_msgs', 'lifecycle_msgs', 'rosgraph_msgs',
    'sensor_msgs', 'std_msgs', 'std_srvs', 'trajectory_msgs', 'vla_policy_msgs', 'ament_index_python',
}  # fmt: skip
NETWORK = {'torch', 'transformers', 'safetensors', 'tokenizers'}
BELOW_RUNTIME = {'observation', 'policy', 'control', 'robot', 'types'}
EPISODE_LIBRARIES = {'numpy', 'cv2', 'av', 'pyarrow', 'rosbags', 'pydantic', 'rich'}
BELOW_TRAINING = {'episodes', 'model', 'policy', 'observation', 'robot', 'strict_yaml', 'types', 'resources'}
TRAINING_TOOLS = {'accelerate', 'peft', 'pydantic', 'rich', 'yaml'}

# Room or file -> what it may import beside the standard library: rooms of ours, and other packages. The longest match counts.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    '__init__': (set(), set()),
    'resources': (set(), set()),
    'types': (set(), {'numpy'}),
    'strict_yaml': (set(), {'pydantic', 'yaml'}),
    'robot': ({'types', 'strict_yaml'}, {'numpy', 'pydantic'}),
    'observation': ({'robot', 'types'}, {'numpy', 'cv2'}),
    'model': (set(), {'numpy', *NETWORK}),
    'policy': ({'model', 'robot', 'types'}, {'numpy', *NETWORK}),
    'control': ({'robot', 'types'}, {'numpy'}),
    'control/kinematics': (set(), {'numpy', 'mujoco'}),  # on demand: see test_importing_a_room_stays_light
    'runtime': (BELOW_RUNTIME, {'numpy'}),
    'ros': ({'bags', 'episodes', 'runtime', *BELOW_RUNTIME, 'resources'}, {'numpy', 'cv2', 'av', 'rosbags', *ROS}),
    'bags': ({'control', 'types'}, {'numpy', 'rosbags'}),
    'replay/ray_cluster': (set(), {'ray'}),  # optional, on demand
    'replay': ({'bags', 'episodes', 'runtime', *BELOW_RUNTIME, 'resources'}, {'numpy', 'cv2', 'rosbags', 'matplotlib'}),
    'episodes/sim_recording': ({'sim', 'episodes', 'robot', 'types'}, {'numpy'}),  # the simulator as a robot that can be recorded
    'episodes': ({'bags', 'runtime', 'observation', 'control', 'robot', 'strict_yaml', 'types'}, EPISODE_LIBRARIES),
    'training': (BELOW_TRAINING, {'numpy', *NETWORK, *TRAINING_TOOLS}),
    'training/tabletop': ({'sim', *BELOW_TRAINING}, {'numpy', *NETWORK}),  # the simulator's examples; the trainer takes any
    'sim': ({'control', 'robot', 'types', 'resources'}, {'numpy', 'mujoco', 'cv2'}),
    'sim/ros_node': ({'sim', 'control', 'robot', 'types', 'resources'}, {'numpy', *ROS}),
    'demo': ({'ros', 'sim', *BELOW_RUNTIME, 'resources'}, {'numpy', 'cv2', 'av', 'rich', 'rosbags', 'yaml'}),
    'evaluation': ({'demo', 'ros', 'runtime', 'sim', *BELOW_RUNTIME, 'resources'}, {'numpy', 'rich', 'yaml'}),
    'robot_report': ({'robot'}, {'rich'}),
    'cli': (
        {'bags', 'demo', 'episodes', 'evaluation', 'robot_report', 'ros', 'replay', 'training', 'sim', *BELOW_RUNTIME, 'resources'},
        {'numpy', 'typer', 'rich'},
    ),
}  # fmt: skip

# Rooms that meet the outside, where the time of day means something. Durations (monotonic, perf_counter) any room may measure.
MEET_THE_CLOCK = ('ros', 'sim/ros_node', 'demo', 'cli')
WALL_CLOCK = {
    'time': {'time', 'time_ns', 'localtime', 'gmtime', 'ctime', 'strftime', 'clock_gettime', 'clock_gettime_ns'},
    'datetime': {'now', 'utcnow', 'today'},
    'datetime.datetime': {'now', 'utcnow', 'today'},
    'datetime.date': {'today'},
}


def room_of(module: str) -> str:
    """Key of ROOMS for a module path such as ``control/planner``."""
    matches = [room for room in ROOMS if module == room or module.startswith(f'{room}/')]
    assert matches, f'{module}.py is in no room of the table: add its room here and to docs/architecture.md'
    return max(matches, key=len)


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports; relative imports are made absolute."""
    package = [PACKAGE, *module.split('/')[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = '.'.join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f'{source}.{alias.name}') for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ('import_module', '__import__') and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def import_violations(source: str, module: str) -> list[str]:
    """What the module at ``module`` (path below the package, without .py) imports against the table."""
    room = room_of(module)
    ours, others = ROOMS[room]
    found = []
    for line, name in imports(ast.parse(source), module):
        parts = name.split('.')
        if parts[0] != PACKAGE:
            if parts[0] not in sys.stdlib_module_names and parts[0] not in others:
                found.append(f'{module}.py:{line}: {room} may not import {parts[0]}')
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else '__init__'
        own = room.split('/')[0]
        if target not in ('__init__', own) and target not in ours:
            found.append(f'{module}.py:{line}: {room} may not import {PACKAGE}.{target}')
        if target == 'sim' and parts[2:3] == ['ros_node'] and room != 'sim/ros_node':
            found.append(f'{module}.py:{line}: {room} may not import the simulator node, it brings rclpy')
    return found


def clock_violations(source: str, module: str) -> list[str]:
    """Where the module reads the time of day, however it spells the import."""
    if room_of(module) in MEET_THE_CLOCK:
        return []
    tree = ast.parse(source)
    aliases: dict[str, str] = {}  # local name -> module, class or function it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module in ('time', 'datetime'):
            aliases.update({alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names})
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        first, _, rest = ast.unparse(node).partition('.')
        if first not in aliases:
            continue
        name = f'{aliases[first]}.{rest}'.rstrip('.')
        owner, _, function = name.rpartition('.')
        if function in WALL_CLOCK.get(owner, ()):
            found.append(f'{module}.py:{node.lineno}: reads the wall clock ({name}); take the time as an argument')
    return found


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')


def modules(root: Path) -> dict[str, str]:
    """Module path below the package -> source text."""
    package = root / PACKAGE
    return {str(path.relative_to(package).with_suffix('')): path.read_text() for path in sorted(package.rglob('*.py'))}


def test_rooms_import_only_what_the_table_allows(root: Path) -> None:
    found = [violation for module, source in modules(root).items() for violation in import_violations(source, module)]
    assert not found, '\n'.join(found)


def test_only_ros_rooms_name_rclpy_and_only_network_rooms_name_torch() -> None:
    assert {room for room, (_, others) in ROOMS.items() if 'rclpy' in others} == {'ros', 'sim/ros_node'}
    assert {room.split('/')[0] for room, (_, others) in ROOMS.items() if 'torch' in others} == {'model', 'policy', 'training'}
    assert ROOMS['model'][0] == set()


def test_rooms_do_not_depend_on_each_other_in_a_circle() -> None:
    graph = {room: ours - {room.split('/')[0]} for room, (ours, _) in ROOMS.items()}
    while free := {room for room, ours in graph.items() if not ours & graph.keys()}:
        graph = {room: ours for room, ours in graph.items() if room not in free}
    assert not graph, f'these rooms need one another: {sorted(graph)}'


def test_no_room_reads_the_wall_clock(root: Path) -> None:
    found = [violation for module, source in modules(root).items() for violation in clock_violations(source, module)]
    assert not found, '\n'.join(found)


@pytest.mark.parametrize(
    ('room', 'absent'),
    [
        ('control', ['torch', 'rclpy', 'mujoco', 'transformers', 'cv2']),
        ('control.workspace', ['torch', 'rclpy', 'mujoco', 'transformers', 'cv2']),
        ('observation', ['torch', 'rclpy', 'mujoco', 'transformers']),
        ('robot', ['torch', 'rclpy', 'mujoco', 'cv2']),
        ('types', ['torch', 'rclpy', 'mujoco', 'cv2', 'pydantic']),
        ('runtime', ['torch', 'rclpy', 'mujoco', 'transformers']),
        ('policy', ['torch', 'rclpy', 'mujoco', 'transformers']),
        ('replay.bag_trajectories', ['torch', 'rclpy', 'mujoco', 'cv2']),
        ('episodes.bag_episode', ['torch', 'rclpy', 'mujoco', 'av', 'pyarrow']),
        ('episodes.lerobot', ['torch', 'rclpy', 'mujoco']),
        ('replay.trajectory_lint', ['torch', 'rclpy', 'mujoco', 'cv2', 'rosbags']),
        ('sim', ['torch', 'rclpy', 'transformers']),
        ('cli', ['torch', 'rclpy', 'mujoco', 'transformers', 'cv2', 'av']),
    ],
)
def test_importing_a_room_stays_light(root: Path, room: str, absent: list[str]) -> None:
    """What a fresh interpreter has loaded after importing the room, through however many other modules."""
    code = f'import sys, json, {PACKAGE}.{room}; print(json.dumps([m for m in {absent!r} if m in sys.modules]))'
    answer = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == []


def test_every_room_says_what_it_is(root: Path) -> None:
    for module, source in modules(root).items():
        docstring = ast.get_docstring(ast.parse(source))
        assert docstring, f'{module}.py has no docstring'


def test_sources_are_python_3_10(root: Path) -> None:
    for module, source in modules(root).items():
        ast.parse(source, filename=module, feature_version=(3, 10))


PLANTED = [
    ('control/planner', 'import torch'),
    ('control/planner', 'def f():\n    from rclpy.node import Node'),
    ('control/planner', 'from vla_policy_ros.policy import executor'),
    ('control/planner', 'from ..sim import world'),
    ('model/modeling', 'from vla_policy_ros.types import Observation'),
    ('model/modeling', 'from .. import robot'),
    ('sim/world', 'import rclpy'),
    ('sim/dataset', 'from .ros_node import SimNode'),
    ('cli', 'import importlib\nimportlib.import_module("torch")'),
    ('runtime', 'if True:\n    import mujoco.viewer'),
    ('types', 'import pydantic'),
]


@pytest.mark.parametrize(('module', 'source'), PLANTED)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert import_violations(source, module)


@pytest.mark.parametrize(
    ('module', 'source'),
    [
        ('control/planner', 'import math\nimport numpy as np\nfrom ..types import ActionChunk\nfrom . import limits'),
        ('control/planner', 'from vla_policy_ros import __version__\nfrom vla_policy_ros.robot import Robot'),
        ('sim/ros_node', 'import rclpy\nfrom .world import TabletopWorld\nfrom vla_policy_ros.control.jtc import Controller'),
        ('ros/policy_node', 'import rclpy\nfrom ..runtime import Runtime'),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert import_violations(source, module) == []


@pytest.mark.parametrize(
    'source',
    [
        'import time\nstamp = time.time_ns()',
        'import time as t\nstamp = t.time()',
        'from time import time\nstamp = time()',
        'from time import time_ns as now\nclock = now',
        'import datetime\nstamp = datetime.datetime.now()',
        'from datetime import datetime as dt\nstamp = dt.utcnow()',
        'from datetime import date\nstamp = date.today()',
    ],
)
def test_a_planted_clock_is_found(source: str) -> None:
    assert clock_violations(source, 'runtime')
    assert clock_violations(source, 'ros/policy_node') == []


def test_measuring_a_duration_is_not_reading_the_clock() -> None:
    source = 'import time\nfrom time import perf_counter\ntime.monotonic_ns()\nperf_counter()\nself.time.time = 1'
    assert clock_violations(source, 'model/modeling') == []


def test_a_room_outside_the_table_is_refused() -> None:
    with pytest.raises(AssertionError, match='no room'):
        room_of('utilities/misc')
