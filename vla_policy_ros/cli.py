"""The command line `vla-policy`: a thin door to each room, which is imported when its command runs.

Enters: arguments. Leaves: an exit code: 0 done, 1 ran but failed, 2 could not begin. Main thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vla_policy_ros import __version__

if TYPE_CHECKING:
    from vla_policy_ros.bags.recording import Recording

app = typer.Typer(
    help='A 3D vision-language-action policy as a ROS 2 node.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RobotOption = Annotated[str, typer.Option(help='Robot file: a path, or the name of a shipped one.')]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f'vla_policy_ros {__version__}')
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option('--version', callback=_print_version, is_eager=True, help='Print the version.')] = False,
) -> None:
    """Options that belong to no command."""


@contextmanager
def _sentence_instead_of_traceback(*errors: type[Exception]) -> Iterator[None]:
    """End with exit code 2 and the message alone where one of ``errors``, whose messages are written for operators, is raised."""
    try:
        yield
    except errors as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


@contextmanager
def _training_libraries() -> Iterator[None]:
    """End with exit code 2 where a library that only data and training need is not installed."""
    try:
        yield
    except ImportError as error:
        typer.echo(f'{error}: pip install -r requirements/training.txt', err=True)
        raise typer.Exit(2) from error


@contextmanager
def _bar(what: str) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Lines for the operator on standard error and, on a terminal, a bar under them: ``tell(line)`` and ``progress(done, of)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: typer.echo(line, err=True), lambda done, of: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        yield tell, lambda done, of: bar.update(task, completed=done, total=of)


@app.command()
def demo(
    headless: Annotated[bool, typer.Option('--headless', help='No live panel: lines of text, for machines and logs.')] = False,
    seconds: Annotated[float, typer.Option(min=1.0, max=3600.0, help='How long, in simulated seconds.')] = 30.0,
    json_file: Annotated[Path | None, typer.Option('--json', help='Also write the summary to this file.')] = None,
    out: Annotated[Path, typer.Option(help='Folder for video, bag, logs and summary; former ones are replaced.')] = Path('demo'),
    instruction: Annotated[str | None, typer.Option(help='One instruction for the whole run; else each object in turn.')] = None,
    seed: Annotated[int, typer.Option(min=0, help='Which scene.')] = 6,
    checkpoint: Annotated[str, typer.Option(help='Checkpoint: a folder, or the name of a shipped one.')] = 'tabletop',
    robot: RobotOption = 'tabletop',
    rate: Annotated[float, typer.Option(min=0.1, max=50.0, help='Action chunks per second.')] = 5.0,
    realtime_factor: Annotated[
        float, typer.Option(min=0.05, max=1.0, help='Simulated seconds per second: below 1 for a machine that infers slowly.')
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Plan and preview, but send nothing to the controllers.')] = False,
) -> None:
    """Run a simulated arm and the policy in a closed loop; write video, bag and summary."""
    from vla_policy_ros.demo.session import DemoOptions, run_demo
    from vla_policy_ros.resources import ResourceError, checkpoint_path, robot_path

    with _sentence_instead_of_traceback(ResourceError, ValueError):
        options = DemoOptions(
            headless=headless,
            seconds=seconds,
            json_file=json_file,
            out=out,
            instruction=instruction,
            seed=seed,
            checkpoint=checkpoint_path(checkpoint),
            robot_file=robot_path(robot),
            rate=rate,
            realtime_factor=realtime_factor,
            dry_run=dry_run,
        )
        raise typer.Exit(run_demo(options))


NewFolder = Annotated[Path, typer.Option(help='Folder of the new checkpoint; it must not hold one already.')]
PresetOption = Annotated[
    str,
    typer.Option(help='Size of the network: tiny, tabletop, llava3d-7b, llava3d-7b-expert, llava3d-7b-expert-512 or -expert-clip.'),
]
DtypeOption = Annotated[str, typer.Option(help='Of the weights: bfloat16, float16 or float32.')]
SeedOption = Annotated[int, typer.Option(min=0, help='Seed of the random weights.')]


def _print_progress(written: int, total: int) -> None:
    typer.echo(f'{written / 1e9:.2f} of {total / 1e9:.2f} GB', err=True)


@app.command()
def new(
    robot: RobotOption,
    out: NewFolder,
    preset: PresetOption = 'tiny',
    seed: SeedOption = 0,
    dtype: Annotated[
        str | None, typer.Option(help='Of the weights. Without it: float32 for tiny and tabletop, bfloat16 for the others.')
    ] = None,
) -> None:
    """Make a fresh, untrained checkpoint that fits a robot file."""
    from vla_policy_ros.resources import robot_path
    from vla_policy_ros.robot import load_robot

    with _sentence_instead_of_traceback(OSError, ValueError):
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f'{out} is not empty; give a new folder, so that no checkpoint is overwritten')
        resolved = load_robot(robot_path(robot))

        # Loads torch, which takes seconds: only now that everything else is known to be right.
        from vla_policy_ros.policy import FROM_NOTHING, new_checkpoint, write_base_checkpoint

        if preset in FROM_NOTHING:
            new_checkpoint(resolved, preset, out, seed, dtype or 'float32')
        else:
            write_base_checkpoint(resolved, out, preset=preset, dtype=dtype or 'bfloat16', seed=seed, progress=_print_progress)
    typer.echo(f'{out}: preset {preset} for robot {resolved.name}, untrained. Try it with dry_run first.')


@app.command()
def convert(
    robot: RobotOption,
    out: NewFolder,
    preset: Annotated[str | None, typer.Option(help='Size of the network, such as llava3d-7b-expert, or')] = None,
    config: Annotated[Path | None, typer.Option(help='a JSON file of network sizes, such as a config.json.')] = None,
    language: Annotated[Path | None, typer.Option(help='Folder of LLaVA-3D, LLaVA-1.5, Vicuna or Mistral.')] = None,
    vision: Annotated[Path | None, typer.Option(help='Folder of SigLIP or CLIP.')] = None,
    geometry: Annotated[Path | None, typer.Option(help='Folder of MapAnything.')] = None,
    dtype: DtypeOption = 'bfloat16',
    seed: SeedOption = 0,
) -> None:
    """Build a base checkpoint for a robot from local folders of public weights (safetensors)."""
    from vla_policy_ros.resources import robot_path
    from vla_policy_ros.robot import load_robot

    given = {'language': language, 'vision': vision, 'geometry': geometry}
    folders = {part: folder for part, folder in given.items() if folder is not None}
    with _sentence_instead_of_traceback(OSError, ValueError):
        if not folders:
            raise ValueError('give at least one of --language, --vision and --geometry; `vla-policy new` needs none')
        resolved = load_robot(robot_path(robot))

        from vla_policy_ros.policy import write_base_checkpoint

        report = write_base_checkpoint(
            resolved, out, preset=preset, sizes_file=config, folders=folders, dtype=dtype, seed=seed, progress=_print_progress
        )
    for line in report.lines():
        typer.echo(line)
    typer.echo(f'{out}: base checkpoint for robot {resolved.name}, not trained on any robot; see its README.md for the licences.')


@app.command()
def check(robot: Annotated[str, typer.Argument(help='Robot file: a path, or the name of a shipped one.')]) -> None:
    """Validate a robot file and print what it resolves to."""
    from vla_policy_ros.resources import robot_path
    from vla_policy_ros.robot import load_robot
    from vla_policy_ros.robot_report import print_robot

    with _sentence_instead_of_traceback(OSError, ValueError):
        path = robot_path(robot)
        print_robot(load_robot(path), path)


@app.command()
def lint(
    bag: Annotated[Path | None, typer.Argument(help='Bag: folder, .mcap or .db3. Without it, the live --topic.')] = None,
    topic: Annotated[str | None, typer.Option(help='Command topic. Without it, all of the bag, or those of --robot.')] = None,
    profile: Annotated[str, typer.Option(help='Release of ros2_controllers: humble, jazzy, kilted or rolling.')] = 'jazzy',
    param: Annotated[
        list[str] | None,
        typer.Option(help='Controller parameter, such as interpolate_from_desired_state=true. Give it as often as needed.'),
    ] = None,
    update_rate: Annotated[float | None, typer.Option(help="Of the controller, Hz; else the robot file's, else 100.")] = None,
    velocity: Annotated[float | None, typer.Option(help="Limit of every joint, per second; else the robot file's.")] = None,
    robot: Annotated[str | None, typer.Option(help='Robot file: a path, or the name of a shipped one.')] = None,
    json_file: Annotated[str | None, typer.Option('--json', help='Also write the report to this file; - prints only that.')] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=86400.0, help='How long to listen to a live topic.')] = 10.0,
) -> None:
    """Say which trajectories a controller would reject or turn into a step, and why.

    Ends with 0 where nothing was found, 1 with findings, 2 where it could not begin.
    """
    from vla_policy_ros.replay.lint_profile import ControllerChoice, parse_changes
    from vla_policy_ros.replay.lint_report import LintReport
    from vla_policy_ros.replay.trajectory_lint import lint_recording
    from vla_policy_ros.resources import robot_path
    from vla_policy_ros.robot import load_robot

    with _sentence_instead_of_traceback(OSError, ValueError):
        known = None if robot is None else load_robot(robot_path(robot))
        choice = ControllerChoice(profile, parse_changes(param or ()), update_rate, velocity, known)
        recordings = _recordings(bag, topic, choice.command_topics, seconds)
        controllers = [choice.parameters_for(recording) for recording in recordings]
        topics = [
            lint_recording(recording, controller, choice.velocity_limits(controller.joints))
            for recording, controller in zip(recordings, controllers, strict=True)
        ]
        report = LintReport(str(bag or topic), choice.distro, choice.changes, tuple(topics))
        text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
        if json_file not in (None, '-'):
            Path(json_file).write_text(text + '\n', encoding='utf-8')
    for line in [text] if json_file == '-' else report.lines():
        typer.echo(line)
    raise typer.Exit(0 if report.clean else 1)


def _recordings(bag: Path | None, topic: str | None, preferred: Sequence[str], seconds: float) -> list[Recording]:
    """From the bag, or live. Raises ValueError or OSError where there is nothing to judge."""
    if bag is not None:
        from vla_policy_ros.replay.bag_trajectories import read_recordings

        return read_recordings(bag, topic, preferred)
    if topic is None:
        raise ValueError('give a bag, or the command topic of a live system with --topic')
    from vla_policy_ros.bags.recording import recording_from_messages, state_topic_of

    try:
        from vla_policy_ros.ros.lint_topic import LiveTopicError, listen
    except ImportError as error:
        raise ValueError(f'a live topic needs ROS 2 ({error}): source its setup file, or give a bag') from error
    try:
        heard = listen(topic, state_topic_of(topic), seconds, lambda line: typer.echo(line, err=True))
    except LiveTopicError as error:
        raise ValueError(str(error)) from error
    return [recording_from_messages(topic, heard.trajectories, heard.states)]


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help='Folder; each episode becomes a bag (mcap) in it, numbered after those there.')],
    *,
    robot: RobotOption,
    episodes: Annotated[int, typer.Option(min=0, help='How many; 0 is until Ctrl-C.')] = 1,
    seconds: Annotated[float | None, typer.Option(min=0.1, help='Length of each; else until Enter, ~/toggle or Ctrl-C.')] = None,
    pause: Annotated[float, typer.Option(min=0.0, help='Between two that begin by themselves, s.')] = 0.0,
    instruction: Annotated[str | None, typer.Option(help='Published meanwhile; else what others publish is recorded.')] = None,
    patience: Annotated[float, typer.Option(min=0.1, help='How long to wait for the inputs, s.')] = 30.0,
    use_sim_time: Annotated[bool, typer.Option('--use-sim-time', help='Take the time of /clock.')] = False,
    sim: Annotated[bool, typer.Option('--sim', help='The simulator with its scripted expert instead of a robot; no ROS.')] = False,
    task: Annotated[str, typer.Option(help='Task of --sim.')] = 'reach',
    seed: Annotated[int, typer.Option(min=0, help='Scenes of --sim.')] = 0,
) -> None:
    """Record episodes of a live robot, or of the simulator, with a note of where they come from."""
    from vla_policy_ros.resources import robot_path
    from vla_policy_ros.robot import load_robot

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    with _sentence_instead_of_traceback(OSError, ValueError):
        path = robot_path(robot)
        resolved = load_robot(path)
        if sim:
            from vla_policy_ros.episodes.sim_recording import record_simulated
            from vla_policy_ros.sim.render_error import RenderError

            with _sentence_instead_of_traceback(RenderError):
                recorded = record_simulated(resolved, out, task, seed, max(1, episodes), seconds, tell)
            raise typer.Exit(0 if recorded else 1)
        try:
            from vla_policy_ros.ros.episode_recorder import RecordingError, RecordingOptions, record_episodes
        except ImportError as error:
            raise ValueError(f'recording needs ROS 2 ({error}): source its setup file, or give --sim') from error
        text = path.read_text(encoding='utf-8')
        options = RecordingOptions(out, text, episodes, seconds, pause, instruction, use_sim_time, patience)
        with _sentence_instead_of_traceback(RecordingError):
            finished = record_episodes(resolved, options, tell)
    raise typer.Exit(0 if finished else 1)


@app.command()
def dataset(
    source: Annotated[Path, typer.Argument(help='A bag, a folder of bags, or a LeRobot dataset (v2.0, v2.1, v3.0).')],
    destination: Annotated[Path | None, typer.Argument(help='New folder. Without it, the source is only looked at.')] = None,
    *,
    robot: RobotOption,
    to: Annotated[str | None, typer.Option(help='lerobot (v3.0) or bag; else whichever the source is not.')] = None,
    episode: Annotated[list[int] | None, typer.Option(help='Only this one. Give it as often as needed.')] = None,
    camera: Annotated[
        list[str] | None, typer.Option(help='CAMERA=FEATURE of a LeRobot dataset, where names differ. As often as needed.')
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help='YAML file of names that differ, see docs/datasets.md.')] = None,
    instruction: Annotated[str | None, typer.Option(help='Instead of what is recorded.')] = None,
    fps: Annotated[int | None, typer.Option(min=1, max=1000, help='Rows per second of a LeRobot dataset; else measured.')] = None,
    codec: Annotated[str, typer.Option(help='Of LeRobot videos: h264, av1, or auto.')] = 'auto',
    max_gap: Annotated[float, typer.Option(min=0.01, help='A longer pause begins a new LeRobot episode, s.')] = 0.5,
    skip_damaged: Annotated[bool, typer.Option('--skip-damaged', help='Leave out and report what cannot be read.')] = False,
    json_file: Annotated[str | None, typer.Option('--json', help='Also write the report to this file; - prints only that.')] = None,
) -> None:
    """Report on recorded episodes, and convert them: bags to LeRobot v3.0, LeRobot to bags (mcap).

    Ends with 0, or with 1 where something was left out.
    """
    from rich.console import Console

    with _training_libraries():
        from vla_policy_ros.episodes.convert import Options, convert, format_named, inspect
        from vla_policy_ros.episodes.mapping import DatasetMapping, load_mapping, with_cameras
        from vla_policy_ros.episodes.quality_report import REPORT_WIDTH, print_report
        from vla_policy_ros.episodes.sources import find_episodes, is_lerobot
    from vla_policy_ros.resources import robot_path
    from vla_policy_ros.robot import load_robot

    def progress(name: str) -> None:
        typer.echo(name, err=True)

    with _sentence_instead_of_traceback(OSError, ValueError):
        resolved = load_robot(robot_path(robot))
        names = with_cameras(load_mapping(mapping) if mapping else DatasetMapping(), camera or ())
        sources = find_episodes(source, resolved, mapping=names, instruction=instruction, only=episode)
        if destination is None:
            report = inspect(sources, source.name, resolved, progress, skip_damaged)
        else:
            kind = format_named(to or ('bag' if is_lerobot(source) else 'lerobot'))
            options = Options(fps, codec, max_gap, skip_damaged)
            report = convert(sources, source.name, destination, kind, resolved, options, progress)
        text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
        if json_file not in (None, '-'):
            Path(json_file).write_text(text + '\n', encoding='utf-8')
    if json_file == '-':
        typer.echo(text)
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else REPORT_WIDTH))
    raise typer.Exit(1 if any(outcome.problem for outcome in report.episodes) else 0)


@app.command()
def play(
    bag: Annotated[Path, typer.Argument(help='Folder of a rosbag2 bag.')],
    *,
    rate: Annotated[float, typer.Option(help='Speed relative to the recording.')] = 1.0,
    topics: Annotated[list[str] | None, typer.Option(help='Only this topic, which may be a command. Give it repeatedly.')] = None,
    wait_for: Annotated[list[str] | None, typer.Option(help='Begin when this topic has a subscriber. Give it repeatedly.')] = None,
) -> None:
    """Republish a bag over DDS with its clock: real input for a node with use_sim_time. Commands stay out unless they are named."""
    from vla_policy_ros.ros.bag_player import main as play_bag

    lists = [part for name, values in (('--topics', topics), ('--wait-for', wait_for)) if values for part in (name, *values)]
    raise typer.Exit(play_bag(['bag_player', str(bag), '--rate', str(rate), *lists]))


@app.command('open-loop')
def open_loop(
    source: Annotated[Path, typer.Argument(help='A bag, a folder of bags, or a LeRobot dataset.')],
    *,
    checkpoint: Annotated[str, typer.Option(help='Checkpoint: a folder, or the name of a shipped one.')],
    robot: RobotOption,
    episode: Annotated[list[int] | None, typer.Option(help='Only this one. Give it as often as needed.')] = None,
    camera: Annotated[list[str] | None, typer.Option(help='CAMERA=FEATURE of a LeRobot dataset, where names differ.')] = None,
    mapping: Annotated[Path | None, typer.Option(help='YAML file of names that differ, see docs/datasets.md.')] = None,
    instruction: Annotated[str | None, typer.Option(help='Instead of what is recorded.')] = None,
    stride: Annotated[int, typer.Option(min=1, help='Steps from one question to the next.')] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Integration steps; else the checkpoint's.")] = None,
    seed: SeedOption = 0,
    json_file: Annotated[str | None, typer.Option('--json', help='Also write the errors to this file; - prints only them.')] = None,
) -> None:
    """Error of a checkpoint's chunks against what was commanded in recorded episodes, beside two baselines that look at nothing."""
    from rich.console import Console

    with _training_libraries():
        from vla_policy_ros.episodes.mapping import DatasetMapping, load_mapping, with_cameras
        from vla_policy_ros.episodes.quality_report import REPORT_WIDTH
        from vla_policy_ros.episodes.sources import find_episodes
    from vla_policy_ros.resources import checkpoint_path, robot_path
    from vla_policy_ros.robot import load_robot

    with _sentence_instead_of_traceback(OSError, ValueError):
        resolved = load_robot(robot_path(robot))
        names = with_cameras(load_mapping(mapping) if mapping else DatasetMapping(), camera or ())
        sources = find_episodes(source, resolved, mapping=names, instruction=instruction, only=episode)

        # Loads torch, which takes seconds: only now that everything else is known to be right.
        from vla_policy_ros.policy import Policy
        from vla_policy_ros.training.open_loop import measure_all, print_errors, to_dict

        policy = Policy.load(checkpoint_path(checkpoint), resolved, num_steps=steps, seed=seed)
        results = measure_all(policy, sources, stride, lambda name: typer.echo(name, err=True))
        text = json.dumps(to_dict(results, resolved), indent=2, allow_nan=False)
        if json_file not in (None, '-'):
            Path(json_file).write_text(text + '\n', encoding='utf-8')
    if json_file == '-':
        typer.echo(text)
    else:
        print_errors(results, resolved, Console(width=None if sys.stdout.isatty() else REPORT_WIDTH))


@app.command()
def replay(
    bags: Annotated[list[Path], typer.Argument(help='Bags: folders, their .mcap or .db3 files, or ROS 1 bags.')],
    *,
    checkpoint: Annotated[str, typer.Option(help='Checkpoint: a folder, or the name of a shipped one.')],
    robot: RobotOption,
    out: Annotated[Path, typer.Option(help='Folder for a report of each bag.')] = Path('replay'),
    second: Annotated[str | None, typer.Option(help='A second checkpoint, compared with the first.')] = None,
    remap: Annotated[list[str] | None, typer.Option(help='OLD:=NEW: what the bag calls OLD is NEW of the robot file.')] = None,
    instruction: Annotated[str | None, typer.Option(help='Instead of what was recorded.')] = None,
    latency: Annotated[str, typer.Option(help='From question to answer: ms, "measured", or a .json file with a list of ms.')] = '0',
    replan_rate: Annotated[float, typer.Option(help="Hz, as the node's parameter.")] = 5.0,
    start_offset: Annotated[float, typer.Option(help='Seconds of each bag to skip.')] = 0.0,
    playback_duration: Annotated[float | None, typer.Option(help='Seconds of each bag to replay; else to its end.')] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Integration steps; else the checkpoint's.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, ab2 or midpoint; else the checkpoint's.")] = None,
    seed: SeedOption = 0,
    annotated: Annotated[bool, typer.Option(help='Also write a bag with chunks and trajectories.')] = True,
    live: Annotated[Path | None, typer.Option(help='A bag with the chunks of a live node that saw this bag: compared.')] = None,
    jobs: Annotated[int, typer.Option(min=1, help='Processes that share the bags.')] = 1,
    threads: Annotated[int, typer.Option(min=1, help='Threads of torch, per process.')] = 1,
    ray: Annotated[bool, typer.Option('--ray', help='Share the bags over a Ray cluster; needs requirements/ray.txt.')] = False,
    fail_if: Annotated[list[str] | None, typer.Option(help='"NAME > NUMBER": exit code 1 where it holds. Repeat it.')] = None,
) -> None:
    """What a checkpoint would have done in recorded bags, through the code of the live node: reports, before anything moves."""
    from vla_policy_ros.resources import checkpoint_path, robot_path
    from vla_policy_ros.robot import load_robot, remapped

    with _sentence_instead_of_traceback(OSError, ValueError):
        resolved = remapped(load_robot(robot_path(robot)), remap or ())
        missing = [str(bag) for bag in bags if not bag.exists()]
        if missing:
            raise ValueError(f'bag {missing[0]} does not exist; give the folder of a rosbag2 bag, or its .mcap or .db3 file')
        from vla_policy_ros.replay.gate import Gate
        from vla_policy_ros.replay.latency import Latency
        from vla_policy_ros.replay.offline import ReplaySettings

        gates = tuple(Gate.parse(text) for text in fail_if or ())
        settings = ReplaySettings(replan_rate, Latency.parse(latency), start_offset, playback_duration, seed)
        folders = [checkpoint_path(name) for name in (checkpoint, second) if name is not None]

        # Loads torch, which takes seconds: only now that everything else is known to be right.
        from vla_policy_ros.replay.command import ReplayOptions, run

        options = ReplayOptions(
            tuple(bags), resolved, folders[0], out, folders[1] if len(folders) > 1 else None, settings, instruction, steps, solver,
            annotated, live, threads, jobs, gates, ray,
        )  # fmt: skip
        with _bar('bags') as (tell, progress):
            code = run(options, tell, progress)
    raise typer.Exit(code)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help='Training file: a path, or the name of a shipped one.')],
    changes: Annotated[
        list[str] | None, typer.Option('--set', help='Change a value: optimisation.steps=100. Give it as often as needed.')
    ] = None,
    dry: Annotated[bool, typer.Option('--dry-run', help='Only print what the training would take on each device.')] = False,
    gpus: Annotated[str, typer.Option(help='With --dry-run: numbers of devices, joined by commas.')] = '1,4,8',
    gpu_memory: Annotated[float, typer.Option(min=1.0, help='With --dry-run: memory of a device, GB.')] = 80.0,
) -> None:
    """Train a checkpoint as a training file says; goes on with the run that its folder holds.

    On several devices: torchrun --nproc-per-node 8 --no-python vla-policy train CONFIG
    """
    from vla_policy_ros.resources import training_path

    with _sentence_instead_of_traceback(OSError, ValueError):
        from vla_policy_ros.training.config import load_training

        settings = load_training(training_path(config), changes or ())
        if dry:
            from vla_policy_ros.training.dry_run import dry_run

            dry_run(settings, _numbers(gpus), gpu_memory)
            return
        # Loads torch, which takes seconds: only now that the file is known to be right.
        from vla_policy_ros.training.command import train as run

        try:
            run(settings)
        except FloatingPointError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error


def _numbers(text: str) -> list[int]:
    """Positive whole numbers joined by commas. Raises ValueError."""
    parts = text.split(',')
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(f'--gpus {text!r} is not numbers of devices joined by commas, such as 1,4,8')
    return [int(part) for part in parts]


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option(help='Checkpoint: a folder, or the name of a shipped one.')] = 'tabletop',
    robot: RobotOption = 'tabletop',
    tasks: Annotated[str, typer.Option(help='Names of tasks, joined by commas; an unknown one prints the known ones.')] = 'reach',
    variation: Annotated[
        list[str] | None,
        typer.Option(
            help='nominal (the default), or parts joined by +: camera=METRES, held_out_phrasings, held_out_kinds, full_name, '
            'colour_only, shape_only, same_colour, distinct_colours, trained, plain. Give it as often as needed.'
        ),
    ] = None,
    episodes: Annotated[int, typer.Option(help='Per task and variation.')] = 100,
    seed: Annotated[int, typer.Option(help='Which scenes: each seed has its own, none of which training uses.')] = 0,
    choice: Annotated[bool, typer.Option('--choice', help='Scenes for comparing recipes, apart from those of reports.')] = False,
    executed: Annotated[int, typer.Option(help='Actions of each chunk that are carried out before the next look.')] = 2,
    seconds: Annotated[float | None, typer.Option(help="Simulated length of an episode; else the task's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Integration steps; else the checkpoint's own.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, ab2 or midpoint; else the checkpoint's own.")] = None,
    policy_seed: Annotated[int, typer.Option(min=0, help="Of the policy's noise.")] = 0,
    wrong_k: Annotated[float, typer.Option(help='Scale the focal length in every K that the policy is given.')] = 1.0,
    no_k: Annotated[bool, typer.Option('--no-k', help='Give the policy no K.')] = False,
    wrong_instruction: Annotated[
        bool, typer.Option('--wrong-instruction', help='Name another object of the scene than the one that is judged.')
    ] = False,
    ros: Annotated[bool, typer.Option('--ros', help='Through real topics, node and controllers, by the wall clock.')] = False,
    jobs: Annotated[int, typer.Option(help='Processes that share the episodes.')] = 1,
    json_file: Annotated[str | None, typer.Option('--json', help='Also write the numbers here; - prints only them.')] = None,
    rows: Annotated[bool, typer.Option('--rows', help='List every episode in the JSON.')] = False,
    videos: Annotated[Path | None, typer.Option(help='Folder for videos of the first failures.')] = None,
    max_videos: Annotated[int, typer.Option(min=0, help='So many failures at most.')] = 5,
    logs: Annotated[Path | None, typer.Option(help='Folder for the logs of the processes of --ros.')] = None,
    pace: Annotated[bool, typer.Option('--pace', help='With --ros: slow down until the policy keeps its rate.')] = False,
) -> None:
    """Measure in closed loop, in simulation, how often a checkpoint does what it is told."""
    from vla_policy_ros.demo.loop import LoopError
    from vla_policy_ros.demo.processes import ChildError
    from vla_policy_ros.resources import checkpoint_path, robot_path
    from vla_policy_ros.sim.render_error import RenderError

    with _sentence_instead_of_traceback(OSError, ValueError, RenderError, LoopError, ChildError):
        # Loads the simulator.
        from vla_policy_ros.evaluation.closed_loop import LoopSettings
        from vla_policy_ros.evaluation.command import run
        from vla_policy_ros.evaluation.evaluate import EvaluationOptions
        from vla_policy_ros.evaluation.probes import Probe

        options = EvaluationOptions(
            checkpoint=checkpoint_path(checkpoint),
            robot_file=robot_path(robot),
            tasks=tuple(name.strip() for name in tasks.split(',')),
            variations=tuple(variation or ('nominal',)),
            episodes=episodes,
            seed=seed,
            purpose='choice' if choice else 'test',
            loop=LoopSettings(executed, seconds, Probe(wrong_k, no_k, wrong_instruction)),
            num_steps=steps,
            solver=solver,
            policy_seed=policy_seed,
            jobs=jobs,
            rows=rows,
            videos=videos,
            max_videos=max_videos,
        )
        raise typer.Exit(run(options, json_file, ros, logs, pace))


def main() -> None:
    """Entry point."""
    app()


if __name__ == '__main__':
    main()
