"""Build of the ament_python package, by colcon or by pip."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

NAME = 'vla_policy_ros'
HERE = Path(__file__).resolve().parent

EXECUTABLES = {
    'policy_node': 'vla_policy_ros.ros.policy_node:main',
    'sim_node': 'vla_policy_ros.sim.ros_node:main',
    'bag_player': 'vla_policy_ros.ros.bag_player:main',
    'vla-policy': 'vla_policy_ros.cli:main',
}

# `ros2 run` and launch find executables in lib/<package> only. colcon puts the console scripts there (setup.cfg); pip puts them
# in bin whatever setup.cfg says, so a wheel also carries one forwarding script per executable.
FORWARD = '#!/bin/sh\nexec "$(dirname "$0")/../../bin/$(basename "$0")" "$@"\n'


def shared_files():
    """(target folder, files) of everything that installs below share/: launch files, configuration, checkpoints."""
    share = Path('share') / NAME
    found = {
        'share/ament_index/resource_index/packages': [f'resource/{NAME}'],
        str(share): ['package.xml'],
    }
    for folder in ('launch', 'config', 'checkpoints'):
        for path in sorted((HERE / folder).rglob('*')):
            if path.is_file() and '__pycache__' not in path.parts:
                relative = path.relative_to(HERE)
                found.setdefault(str(share / relative.parent), []).append(str(relative))
    return sorted(found.items())


def forwarding_scripts():
    """(target folder, files) of the forwarding scripts of a wheel; nothing when colcon builds."""
    if 'bdist_wheel' not in sys.argv:
        return []
    folder = HERE / 'build' / 'forward'
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXECUTABLES:
        (folder / name).write_text(FORWARD, encoding='utf-8')
        (folder / name).chmod(0o755)
    return [(f'lib/{NAME}', [str((folder / name).relative_to(HERE)) for name in EXECUTABLES])]


setup(
    name=NAME,
    version='0.1.0',
    description='A 3D vision-language-action policy as a ROS 2 node',
    license='Apache-2.0',
    maintainer='vla_policy_ros maintainers',
    maintainer_email='maintainers@vla-policy-ros.example.org',
    python_requires='>=3.10',
    packages=find_packages(include=[NAME, f'{NAME}.*']),
    package_data={NAME: ['py.typed']},
    data_files=[*shared_files(), *forwarding_scripts()],
    # The libraries come from rosdep and from requirements/, not from here: a robot has some of them under other names
    # (python3-opencv), which pip would not recognise.
    install_requires=['setuptools'],
    zip_safe=False,
    entry_points={'console_scripts': [f'{name} = {target}' for name, target in EXECUTABLES.items()]},
)
