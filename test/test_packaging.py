"""The package is what it says it is: manifests agree, executables exist, every message is built, shipped files are found."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.specifiers import SpecifierSet

import vla_policy_ros
from vla_policy_ros import resources

TEXT = {'.py', '.md', '.rst', '.txt', '.toml', '.cfg', '.yaml', '.yml', '.xml', '.sh', '.msg', '.srv', '.cmake', '.json', ''}


def manifest(path: Path) -> dict[str, list[str]]:
    """Texts of the elements of a package.xml by tag."""
    found: dict[str, list[str]] = {}
    for element in ElementTree.parse(path).getroot().iter():
        found.setdefault(element.tag, []).append((element.text or '').strip())
    return found


@pytest.fixture
def setup_arguments(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **arguments: seen.update(arguments))
    monkeypatch.chdir(root)
    runpy.run_path(str(root / 'setup.py'))
    return seen


def test_manifests_agree(root: Path, setup_arguments: dict[str, Any]) -> None:
    package, messages = manifest(root / 'package.xml'), manifest(root / 'msg' / 'package.xml')
    assert package['name'] == [setup_arguments['name']] == ['vla_policy_ros']
    assert package['version'] == messages['version'] == [setup_arguments['version']] == [vla_policy_ros.__version__]
    assert package['license'] == messages['license'] == [setup_arguments['license']] == ['Apache-2.0']
    assert package['maintainer'] == messages['maintainer'] == [setup_arguments['maintainer']]
    assert messages['name'][0] in package['depend']


def test_every_package_of_the_tree_is_installed(root: Path, setup_arguments: dict[str, Any]) -> None:
    folders = {str(p.parent.relative_to(root)).replace('/', '.') for p in (root / 'vla_policy_ros').rglob('*.py')}
    assert set(setup_arguments['packages']) == folders, 'a folder with code lacks its __init__.py'


def test_executables_lead_to_functions(root: Path, setup_arguments: dict[str, Any]) -> None:
    scripts = dict(entry.replace(' ', '').split('=') for entry in setup_arguments['entry_points']['console_scripts'])
    assert {'policy_node', 'sim_node', 'bag_player', 'vla-policy'} <= set(scripts)
    for name, target in scripts.items():
        module, function = target.split(':')
        source = root.joinpath(*module.split('.')).with_suffix('.py')
        assert source.is_file(), f'{name}: {source} does not exist'
        defined = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert function in defined, f'{name}: {source} defines no {function}()'


def test_every_shipped_file_is_installed(root: Path, setup_arguments: dict[str, Any]) -> None:
    installed = {source: target for target, sources in setup_arguments['data_files'] for source in sources}
    for folder in ('config', 'launch', 'checkpoints'):
        for path in (root / folder).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                relative = path.relative_to(root)
                assert installed[str(relative)] == f'share/vla_policy_ros/{relative.parent}'
    assert installed['resource/vla_policy_ros'] == 'share/ament_index/resource_index/packages'
    assert installed['package.xml'] == 'share/vla_policy_ros'


def test_cmake_builds_every_interface(root: Path) -> None:
    listed = re.findall(r'"\$\{(msg|srv)_base\}:((?:msg|srv)/\w+\.(?:msg|srv))"', (root / 'msg' / 'CMakeLists.txt').read_text())
    files = {f'msg/{path.name}' for path in (root / 'msg').glob('*.msg')}
    files |= {f'srv/{path.name}' for path in (root / 'msg' / 'srv').glob('*.srv')}
    assert {path for _, path in listed} == files
    assert all(path.startswith(base) for base, path in listed)


def test_messages_are_built_from_these_files(root: Path) -> None:
    """The generated classes have the fields of the files: a stale build would give a node that cannot talk to its recorder."""
    import vla_policy_msgs.msg

    for path in (root / 'msg').glob('*.msg'):
        lines = (line.split('#')[0].split() for line in path.read_text().splitlines())
        fields = [words[1] for words in lines if len(words) == 2 and '=' not in words[1]]
        assert list(getattr(vla_policy_msgs.msg, path.stem).get_fields_and_field_types()) == fields


def tracked_texts(root: Path) -> list[Path]:
    """Text files that belong to the project: tracked, or new and not ignored."""
    listing = ['git', '-C', str(root), 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    answer = subprocess.run(listing, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip(f'not a git checkout: {answer.stderr.strip()}')
    paths = (root / name for name in answer.stdout.split('\0') if name)
    return [path for path in paths if path.suffix in TEXT and path.is_file() and path.stat().st_size < 1_000_000]


def machine_paths(text: str, root: Path) -> list[str]:
    """Absolute paths in a text that exist only on the machine of whoever wrote it."""
    private = [str(root.parent) + '/', str(Path.home()) + '/'] if root.parent != Path('/') else []
    found = re.findall(r'(?<![\w.$}])/(?:home|Users|root|mnt|workspace)/[\w.-]+', text)
    return found + [path for path in private if path in text]


def test_no_paths_of_one_machine(root: Path) -> None:
    texts = tracked_texts(root)
    assert len(texts) > 20
    offending = {}
    for path in texts:
        found = machine_paths(path.read_text(encoding='utf-8', errors='replace'), root)
        if found and path != Path(__file__):
            offending[str(path.relative_to(root))] = found
    assert not offending


def test_machine_paths_are_recognised() -> None:
    assert machine_paths("open('/home/anna/x.bag')", Path('/srv/code/vla')) == ['/home/anna']
    assert machine_paths('see /srv/code/notes', Path('/srv/code/vla')) == ['/srv/code/']
    assert machine_paths("topic: /scene_camera/image_raw, ${HOME}/home/x, '/dev/null'", Path('/srv/code/vla')) == []


def test_shipped_files_are_found_from_source(root: Path) -> None:
    assert resources.share_path('config/robots/tabletop.yaml') == root / 'config/robots/tabletop.yaml'
    assert resources.robot_path('tabletop') == root / 'config/robots/tabletop.yaml'


@pytest.mark.parametrize('through_ament', [False, True])
def test_shipped_files_are_found_when_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_ament: bool) -> None:
    """In the prefix of the code (colcon, pip), or in another one that AMENT_PREFIX_PATH names."""
    prefix = tmp_path / ('elsewhere' if through_ament else 'prefix')
    shipped = prefix / 'share' / 'vla_policy_ros' / 'config' / 'only_installed.yaml'
    shipped.parent.mkdir(parents=True)
    shipped.touch()
    module = tmp_path / 'prefix' / 'lib' / 'python3.11' / 'site-packages' / 'vla_policy_ros' / 'resources.py'
    monkeypatch.setattr(resources, '__file__', str(module))
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(prefix) if through_ament else '')
    assert resources.share_path('config/only_installed.yaml') == shipped


def test_missing_shipped_files_name_what_was_tried(root: Path) -> None:
    with pytest.raises(resources.ResourceError, match=re.escape(str(root / 'config' / 'absent.yaml'))):
        resources.share_path('config/absent.yaml')
    with pytest.raises(resources.ResourceError, match=r"'tabeltop'.*tabletop"):
        resources.robot_path('tabeltop')
    with pytest.raises(ValueError, match='inside the share folder'):
        resources.share_path('../setup.py')


def requirements(root: Path) -> dict[str, str]:
    """Package name -> version range, of every file in requirements/."""
    found: dict[str, str] = {}
    for path in sorted((root / 'requirements').glob('*.txt')):
        for line in path.read_text().splitlines():
            if match := re.match(r'([\w.-]+)\s*([<>=~!].*)$', line.split('#')[0].strip()):
                assert match[1] not in found, f'{match[1]} is required twice'
                found[match[1]] = match[2]
    return found


def test_every_dependency_is_explained_with_its_tested_version(root: Path) -> None:
    rows = re.findall(r'^\| ([\w.-]+) \| ([\d.]+) \| (.+) \|$', (root / 'docs' / 'dependencies.md').read_text(), re.MULTILINE)
    ranges = requirements(root)
    assert {name for name, _, _ in rows} == set(ranges)
    for name, version, reason in rows:
        assert SpecifierSet(ranges[name]).contains(version), f'{name}: {version} is outside {ranges[name]}'
        assert len(reason) > 4


def test_every_import_is_a_declared_dependency(root: Path) -> None:
    """Nothing is imported that is here only because something else brought it."""
    declared = {_normal(name) for name in requirements(root)}
    manifests = [manifest(root / 'package.xml'), manifest(root / 'msg' / 'package.xml')]
    ros = {name for texts in manifests for tag in ('name', 'depend', 'exec_depend', 'test_depend') for name in texts.get(tag, ())}
    distributions = importlib.metadata.packages_distributions()
    unknown: dict[str, set[str]] = {}
    for path in [*(p for folder in ('vla_policy_ros', 'test', 'launch') for p in (root / folder).rglob('*.py')), root / 'setup.py']:
        helpers = {file.stem for file in path.parent.glob('*.py')} | {file.stem for file in (root / 'test').glob('*.py')}
        for name in _imports(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - ros - helpers:
            # An optional library need not be here; its distribution then has the name of the module.
            if not {_normal(distribution) for distribution in distributions.get(name, (name,))} & declared:
                unknown.setdefault(name, set()).add(str(path.relative_to(root)))
    assert not unknown


def _imports(tree: ast.AST) -> set[str]:
    """Top-level names of all absolute imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split('.')[0])
    return found


def _normal(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def test_installed_libraries_are_in_the_tested_ranges(root: Path) -> None:
    """The suite speaks about the versions that requirements/ allows, not about whatever lies in the environment."""
    outside = {}
    optional = ('ray',)
    for name, allowed in requirements(root).items():
        if name.startswith(('ros-', 'colcon')):
            continue  # from the distribution on a machine with ROS 2
        if name in optional and not importlib.util.find_spec(name):
            continue
        version = importlib.metadata.version(name)
        if not SpecifierSet(allowed).contains(version):
            outside[name] = f'{version}, not {allowed}'
    assert not outside
