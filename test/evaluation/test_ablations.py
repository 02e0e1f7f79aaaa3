"""Ablations: tables that regenerate, a page that is put together from them, trainings that go on where they ended."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.ablations import inference, training
from vla_policy_ros.evaluation.ablations.__main__ import main
from vla_policy_ros.evaluation.ablations.tables import Table, assembled, places, table_text
from vla_policy_ros.evaluation.evaluate import EvaluationOptions
from vla_policy_ros.policy import new_checkpoint
from vla_policy_ros.policy.checkpoint import new_model
from vla_policy_ros.resources import checkpoint_path, robot_path, training_path
from vla_policy_ros.robot import load_robot
from vla_policy_ros.training.config import load_training
from vla_policy_ros.training.transfer import transfer_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('untrained') / 'tiny'
    new_checkpoint(load_robot(robot_path('tabletop')), 'tiny', folder, 0, 'float32')
    return folder


def table(name: str, checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict[str, Any], str]:
    """One episode per row, of which some rows are left out."""
    arguments = [name, '--checkpoint', str(checkpoint), '--episodes', '1', '--seconds', '0.4', '--results', str(folder), *more]
    assert main(arguments) == 0
    document: dict[str, Any] = json.loads((folder / f'{name}.json').read_text())
    return document, capsys.readouterr().out


class TestInference:
    def test_solvers_are_compared_with_the_reference_from_the_same_noise(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inference, 'SOLVERS', (('euler', 1), ('midpoint', 2), ('euler', 100)))
        document, printed = table('solver', checkpoint, tmp_path, capsys)
        errors = {(row['solver'], row['steps']): row['rms_error_rad'] for row in document['numbers']}
        # This one is untrained and answers the noise: no solver moves it, and the reference is itself.
        assert errors[('euler', 100)] == 0.0 and [row['evaluations'] for row in document['numbers']] == [1, 4, 100]
        assert all(row['tool_error_m'] >= 0.0 and row['episodes'] == 1 for row in document['numbers'])
        assert printed.startswith('| solver | steps | evaluations |') and 'Checkpoint `' in printed

    def test_false_inputs_have_a_row_each(self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        document, _ = table('inputs', checkpoint, tmp_path, capsys)
        assert [row['told'] for row in document['numbers']] == list(inference.PROBES)
        assert ['followed_rate' in row for row in document['numbers']] == [False] * 4 + [True]

    def test_executed_actions_end_at_the_horizon(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        document, _ = table('executed', checkpoint, tmp_path, capsys)
        assert [row['executed'] for row in document['numbers']] == [1, 2, 4, 8, 12, 16]

    def test_chunking_and_latency_span_a_table(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inference, 'LATENCIES_MS', (0, 200))
        document, printed = table('latency', checkpoint, tmp_path, capsys)
        assert [(row['chunking'], row['latency_ms']) for row in document['numbers']] == [
            (chunking, latency) for chunking in inference.CHUNKING for latency in (0, 200)
        ]
        assert len(document['rows']) == 3 and '| `rtc_guided` |' in printed

    @pytest.mark.parametrize(
        ('more', 'words'),
        [(['--task', 'juggle'], 'juggle'), (['--variation', 'askew'], 'askew'), (['--checkpoint', 'none'], 'none')],
    )
    def test_what_cannot_be_measured_is_refused(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
    ) -> None:
        assert main(['solver', '--checkpoint', str(checkpoint), '--results', str(tmp_path), *more]) == 2
        assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


PAGE = 'Before.\n\n<!-- table: speed -->\nold\n<!-- end of table -->\n\nAfter <!-- table: other -->\n<!-- end of table -->.\n'


class TestPage:
    made = Table('speed', ('what', 'value'), 1, (('a', '1'),), ({'what': 'a'},), {'notes': ['one run']})

    def test_tables_take_their_places_and_nothing_else_changes(self, tmp_path: Path) -> None:
        self.made.write(tmp_path)
        page = assembled(PAGE, tmp_path)
        assert '| what | value |\n|---|---:|\n| a | 1 |\n\none run.' in page and 'old' not in page
        assert page.startswith('Before.\n\n<!-- table: speed -->') and page.endswith('<!-- end of table -->.\n')
        assert 'Not measured yet.' in page and places(page) == ['speed', 'other']
        assert assembled(page, tmp_path) == page

    def test_an_evaluation_is_a_table_too(self, checkpoint: Path, tmp_path: Path) -> None:
        from vla_policy_ros.evaluation.closed_loop import LoopSettings
        from vla_policy_ros.evaluation.evaluate import evaluate

        found = evaluate(EvaluationOptions(checkpoint, robot_path('tabletop'), episodes=1, loop=LoopSettings(seconds=0.1)))
        text = table_text(found)
        assert '| reach | nominal | 1 | 0.0 (0.0–79.3) |' in text and f'Checkpoint `{found["checkpoint"]["hash"][:12]}`' in text

    @pytest.mark.parametrize('content', ['{}', '[]', 'no json', '{"schema": "vla_policy_ros/ablation"}'])
    def test_a_file_that_is_no_table_is_named(self, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / 'speed.json').write_text(content)
        (tmp_path / 'page.md').write_text(PAGE)
        assert main(['page', '--results', str(tmp_path), '--page', str(tmp_path / 'page.md')]) == 2
        assert 'speed.json is no table' in capsys.readouterr().err
        assert (tmp_path / 'page.md').read_text() == PAGE

    def test_check_tells_whether_the_page_is_up_to_date(self, tmp_path: Path) -> None:
        self.made.write(tmp_path)
        (tmp_path / 'page.md').write_text(PAGE)
        command = ['page', '--results', str(tmp_path), '--page', str(tmp_path / 'page.md')]
        assert main([*command, '--check']) == 1 and (tmp_path / 'page.md').read_text() == PAGE
        assert main(command) == 0 and main([*command, '--check']) == 0

    def test_the_page_of_the_documentation_is_up_to_date_and_every_table_has_its_place(self) -> None:
        page = (ROOT / 'docs' / 'results.md').read_text()
        assert assembled(page, ROOT / 'docs' / 'results') == page, 'run python -m vla_policy_ros.evaluation.ablations page'
        files = {path.stem for path in (ROOT / 'docs' / 'results').glob('*.json')}
        assert files <= set(places(page)) and set(inference.INFERENCE) | {'training'} <= set(places(page))


CONFIG = """
robot: tabletop
preset: tiny
data: {source: tabletop, examples: 12, validation_examples: 3}
optimisation: {steps: 100, scenes_per_step: 2, warmup_steps: 1}
losses: {grounding: 0.0}
precision: float32
logging: {log_every: 1, validate_every: 100, state_every: 1, tensorboard: false}
run: unused
out: unused
"""


class TestTraining:
    def ablate(self, folder: Path, *more: str, steps: int = 2) -> int:
        (folder / 'config.yaml').write_text(CONFIG)
        return main(
            ['train', '--config', str(folder / 'config.yaml'), '--runs', str(folder / 'runs'), '--results', str(folder / 'results'),
             '--budget-steps', str(steps), '--episodes', '1', '--seconds', '0.2', *more]
        )  # fmt: skip

    @pytest.mark.slow
    def test_cells_are_trained_once_evaluated_and_tabulated(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = 'deep_fusion,late_fusion,delta_actions'
        assert self.ablate(tmp_path, '--variants', names, '--seeds', '0') == 0
        document = json.loads((tmp_path / 'results' / 'training.json').read_text())
        assert [row['variant'] for row in document['numbers']] == names.split(',')
        runs = tmp_path / 'runs'
        late = json.loads((runs / 'late_fusion' / 'seed_0' / 'checkpoint' / 'config.json').read_text())
        assert late['expert_config']['fusion_depth'] == 'late'
        signature = (runs / 'delta_actions' / 'seed_0' / 'tabletop.yaml').read_text()
        assert 'representation: delta' in signature
        hashes = {
            json.loads((runs / name / 'seed_0' / training.RESULT).read_text())['checkpoint']['hash'] for name in names.split(',')
        }
        assert len(hashes) == 3
        assert len(list((runs / 'examples').glob('*.safetensors'))) == 2, 'rendered once for all cells: training and held out'

        before = {path: path.stat().st_mtime_ns for path in runs.rglob('*') if path.is_file()}
        capsys.readouterr()
        assert self.ablate(tmp_path, '--variants', names, '--seeds', '0,1') == 0
        assert 'seed_0' not in capsys.readouterr().err, 'finished cells are left alone'
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
        rows = json.loads((tmp_path / 'results' / 'training.json').read_text())['numbers']
        assert [row['seeds'] for row in rows] == [[0, 1]] * 3

        assert self.ablate(tmp_path, '--variants', 'deep_fusion', '--seeds', '0', steps=3) == 2
        assert 'was made with another budget_steps' in capsys.readouterr().err

        assert self.ablate(tmp_path, '--variants', 'deep_fusion', '--seeds', '0', '--table', 'one_row') == 0
        one_row = json.loads((tmp_path / 'results' / 'one_row.json').read_text())
        assert one_row['name'] == 'one_row' and [row['variant'] for row in one_row['numbers']] == ['deep_fusion']

    def test_a_table_says_what_was_changed_in_its_training_file(self, tmp_path: Path) -> None:
        options = EvaluationOptions(checkpoint=tmp_path, robot_file=robot_path('tabletop'), episodes=7)
        ablation = training.TrainingAblation('some_file', tmp_path, 5, (0,), options, changes=('optimisation.ema=0.5', 'freeze={}'))
        cell = tmp_path / training.BASE / 'seed_0'
        cell.mkdir(parents=True)
        task = {'variation': 'nominal', 'success_rate': 1.0, 'median_error_m': 0.01}
        seeds = {'purpose': 'test', 'seed': 0, 'first': 1, 'last': 7}
        (cell / training.RESULT).write_text(json.dumps({'tasks': {'reach': task}, 'seeds': seeds, 'cell': {'seed': 0}}))
        text = table_text(training.tabulate(ablation, [training.BASE]).document())
        assert '5 steps of `some_file` with `optimisation.ema=0.5`, `freeze={}` and evaluated in 7 episodes' in text
        plain = table_text(training.tabulate(replace(ablation, changes=()), [training.BASE]).document())
        assert '5 steps of `some_file` and evaluated' in plain

    @pytest.mark.slow
    def test_a_second_part_starts_from_the_first_ones_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / 'first.yaml').write_text(CONFIG)
        first = ['--first', str(tmp_path / 'first.yaml'), '--first-steps', '1']
        assert self.ablate(tmp_path, '--variants', 'late_fusion', '--seeds', '3', *first, '--set', 'preset=null', steps=1) == 1
        assert self.ablate(tmp_path, '--variants', 'late_fusion', '--seeds', '3', *first, steps=1) == 0
        cell = tmp_path / 'runs' / 'late_fusion' / 'seed_3'
        for checkpoint in (cell / 'first' / 'checkpoint', cell / 'checkpoint'):
            assert json.loads((checkpoint / 'config.json').read_text())['expert_config']['fusion_depth'] == 'late'

    def test_a_training_that_fails_is_told_with_its_log(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.ablate(tmp_path, '--variants', 'deep_fusion', '--seeds', '0', '--set', 'optimisation.speed=3') == 1
        assert 'speed' in capsys.readouterr().err
        assert not (tmp_path / 'results').exists()

    @pytest.mark.parametrize(
        ('more', 'words'),
        [
            (['--variants', 'bigger'], 'bigger'),
            (['--seeds', '1,1'], 'seeds are'),
            (['--first', 'x.yaml'], '--first-steps'),
            (['--table', '../other'], 'small letters'),
            (['--table', 'solver'], 'another table'),
        ],
    )
    def test_what_cannot_be_trained_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
    ) -> None:
        assert self.ablate(tmp_path, *more) == 2
        assert words in capsys.readouterr().err

    @pytest.mark.parametrize('name', training.VARIANTS)
    def test_every_variant_makes_the_network_that_it_names(self, name: str, tmp_path: Path) -> None:
        variant = training.VARIANTS[name]
        (tmp_path / 'config.yaml').write_text(CONFIG.replace('tiny', 'tabletop'))
        changes = [*training.places_of(variant.network, 'network'), *variant.changes]
        settings = load_training(tmp_path / 'config.yaml', changes)
        robot = load_robot(training.robot_file_of(robot_path('tabletop'), variant, tmp_path))
        model = new_model(robot, 'tabletop', 0, settings.network)
        config, groups = model.config, load_training(training_path('tabletop_ablation')).transfer_groups
        transfer_weights(model, checkpoint_path('tabletop'), groups)  # raises where the shipped training file does not suit it
        for key, value in variant.network.items():
            for inner, wanted in value.items() if isinstance(value, dict) else [('', value)]:
                assert getattr(getattr(config, key), inner) == wanted if inner else getattr(config, key) == wanted
        assert robot.action.representation == variant.action.get('representation', 'absolute')


def test_importing_the_command_does_not_load_torch() -> None:
    code = 'import sys, vla_policy_ros.evaluation.ablations.__main__; print([m for m in ("torch", "rclpy") if m in sys.modules])'
    answer = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == '[]', answer.stderr
