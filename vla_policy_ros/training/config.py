"""The training file: everything that decides what a run of `vla-policy train` does, in one strict YAML.

Enters: a YAML file and ``key=value`` changes. Leaves: a validated, immutable `TrainingConfig`. Any thread.
`TrainingConfig.identity` is the part that a resumed run must share with the run that it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from vla_policy_ros.strict_yaml import SchemaError, Section, StrictLoader, parse_mapping, validate_mapping
from vla_policy_ros.training.recorded_config import RecordedData

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Steps = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0)]
Group = Literal['vision', 'geometry', 'connectors', 'language', 'embeddings', 'expert', 'heads']
Precision = Literal['float32', 'bfloat16']


class VisitedData(Section):
    """More examples, of states that a policy has led to, answered by the expert (DAgger)."""

    by: Path = Field(description='Checkpoint folder of the policy; in a rollout it takes turns with the expert.')
    examples: int = Field(24_000, gt=0, description='Training examples, beside those of experts.')
    mix: dict[str, float] | None = Field(None, description='Shares of the tasks among the rollouts. None: all the robot can do.')
    strays: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of the rollouts that follow any of a scene's episodes, not the first one."
    )
    misled: float = Field(
        0.0, ge=0.0, le=1.0, description='Share of the rollouts whose expert takes objects to lie 1.5 cm elsewhere while it plays.'
    )


class TabletopData(Section):
    """Examples of the simulated tabletop, made once and kept in files; a scene brings several examples."""

    source: Literal['tabletop'] = Field(description='`tabletop`.')
    examples: int = Field(48_000, gt=0, description='Training examples.')
    validation_examples: int = Field(240, ge=0, description='Held-out examples; 0 is none.')
    folder: Path | None = Field(None, description='Where the examples are kept. None: `examples` in the run folder.')
    seed: int = Field(0, ge=0, description='Which scenes: different seeds share none.')
    mix: dict[str, float] | None = Field(None, description='Shares of the tasks among the scenes. None: all that the robot can do.')
    arrived: float | None = Field(
        None, ge=0.0, le=1.0, description='Share of the states in which the expert has arrived already. None: as time draws them.'
    )
    strays: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of the states on the path of any of a scene's episodes, not on the first one's."
    )
    attempted: float = Field(
        0.0, ge=0.0, le=1.0, description='Share, where there is a zone, that begin after an attempt that was meant for elsewhere.'
    )
    visited: VisitedData | None = Field(None, description='Also examples from where a policy leads. None: only those of experts.')


class ExampleFileData(Section):
    """Examples from files that `ExampleSet.save` wrote."""

    source: Literal['examples'] = Field(description='`examples`.')
    files: tuple[Path, ...] = Field(min_length=1, description='safetensors files of training examples.')
    validation_files: tuple[Path, ...] = Field((), description='Files of held-out examples.')


Data = Annotated[TabletopData | ExampleFileData | RecordedData, Field(discriminator='source')]


class Optimisation(Section):
    """An optimizer with a linear warm-up and a cosine, gradient clipping and a moving average of the weights."""

    steps: Steps = Field(3000, description='Optimiser steps of the whole run; the schedule stretches over them.')
    scenes_per_step: int = Field(8, gt=0, description='Scenes of one step, over all processes; a scene brings all its examples.')
    gradient_accumulation: int = Field(1, gt=0, description='Parts that each process works through one after the other in a step.')
    repeats: int = Field(4, gt=0, description='(noise, time) draws per encoded prefix.')
    optimizer: Literal['adamw', 'muon'] = Field(
        'adamw', description='`adamw`, or `muon` for the matrices inside layers and AdamW for the rest; both with the rates below.'
    )
    learning_rate: Rate = Field(1e-3, description='Peak learning rate.')
    learning_rates: dict[Group, Rate] = Field({}, description='Peak learning rates of single groups of modules, where they differ.')
    warmup_steps: int = Field(100, ge=0, description='Steps of linear rise.')
    final_fraction: Fraction = Field(0.02, description='Last learning rate as a fraction of the peak, reached by a cosine.')
    weight_decay: float = Field(0.01, ge=0.0, description='Decoupled weight decay of matrices; vectors have none.')
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), description="Of AdamW's averages of gradient and squared gradient. Muon has the momentum 0.95."
    )
    clip_norm: Rate = Field(1.0, description='Largest norm of the gradient of a step.')
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.995, description='Decay of the moving average that is saved; 0 is none.')

    @model_validator(mode='after')
    def _parts_fit(self) -> Optimisation:
        if self.scenes_per_step % self.gradient_accumulation:
            raise ValueError(
                f'scenes_per_step {self.scenes_per_step} is not a multiple of gradient_accumulation {self.gradient_accumulation}'
            )
        return self


class Freeze(Section):
    """Groups of modules that keep their weights."""

    vision: bool = Field(False, description='The vision tower.')
    geometry: bool = Field(False, description='The geometry trunk.')
    connectors: bool = Field(False, description='Vision projector and fusion.')
    language: bool = Field(False, description='The language layers.')
    embeddings: bool = Field(False, description='Word embeddings.')
    expert: bool = Field(False, description='The action expert.')


class Lora(Section):
    """Low-rank adapters on the language layers, whose own weights are then frozen; merged into them in the checkpoint."""

    rank: int = Field(16, gt=0, description='Rank.')
    alpha: int = Field(32, gt=0, description='Scale; the update is multiplied by alpha / rank.')
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout of the adapters' input.")
    targets: tuple[Literal['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'], ...] = Field(
        ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'),
        min_length=1,
        description='Projections that get an adapter.',
    )


class Losses(Section):
    """Weights of the losses; 0 leaves a loss and its head out."""

    flow: float = Field(1.0, ge=0.0, description='Flow matching. 0, with losses.perception alone, trains only the towers.')
    grounding: float = Field(0.2, ge=0.0, description='Patch and offset of the named object; needs labelled examples.')
    grounding_layer: int = Field(
        -1,
        description='Language layer whose input `grounding` looks at; -1 is the last. The expert reads the answer from there on.',
    )
    perception: float = Field(0.0, ge=0.0, description='What lies where and how far away, from the pictures; needs a simulator.')

    def weights(self) -> dict[str, float]:
        """Name of each loss to its weight."""
        return {'flow': self.flow, 'grounding': self.grounding, 'perception': self.perception}

    @model_validator(mode='after')
    def _something_to_learn(self) -> Losses:
        if not (self.flow or self.grounding or self.perception):
            raise ValueError('all losses are 0: give at least one of flow, grounding and perception a weight')
        return self


class Logging(Section):
    """When to write what; steps."""

    log_every: Steps = Field(50, description='Training metrics.')
    validate_every: Steps = Field(500, description='Metrics on held-out examples.')
    state_every: Steps = Field(250, description='State to resume from.')
    checkpoint_every: Steps | None = Field(None, description='Checkpoint of the moving average. None: only at the end.')
    tensorboard: bool = Field(True, description='Also write the metrics for TensorBoard.')


class TrainingConfig(Section):
    """The whole training file."""

    robot: str = Field(description='Robot file: a path, or the name of a shipped one.')
    preset: str | None = Field(None, description='Network size to train from nothing, such as `tabletop`.')
    start_from: str | None = Field(
        None, description='Checkpoint whose weights to start from. `preset` then only gives the sizes for a dry run without it.'
    )
    transfer_from: str | None = Field(
        None, description='Checkpoint, also of another robot, whose weights to start from where they fit; with `preset`.'
    )
    transfer_groups: tuple[Group, ...] | None = Field(
        None, min_length=1, description='Groups of weights that are taken from `transfer_from`; the others start anew. None: all.'
    )
    keep_statistics: bool = Field(
        False, description='Keep the statistics of `start_from`, as a continued training on the same robot needs them.'
    )
    network: dict[str, Any] = Field({}, description='Changes to the sizes of `preset`, such as {expert_config: {num_layers: 2}}.')
    data: Data = Field(description='Where the examples come from.')
    optimisation: Optimisation = Field(default_factory=Optimisation, description='How to optimise.')
    freeze: Freeze = Field(default_factory=Freeze, description='What keeps its weights.')
    lora: Lora | None = Field(None, description='Adapters instead of the language layers themselves.')
    losses: Losses = Field(default_factory=Losses, description='Auxiliary losses.')
    precision: Precision = Field('bfloat16', description='Of matrix products; trained weights stay float32.')
    frozen_dtype: Precision = Field('float32', description='Of weights that are not trained.')
    gradient_checkpointing: bool = Field(False, description='Compute the layers again in the backward pass.')
    sharding: Literal['none', 'fsdp'] = Field(
        'none',
        description='With several processes: `none` copies all to each (DDP), `fsdp` shards weights, gradients, optimiser.',
    )
    logging: Logging = Field(default_factory=Logging, description='When to write what.')
    run: Path = Field(description='Folder of the log, the examples and the state to resume from.')
    out: Path = Field(description='Checkpoint folder to write.')
    save_dtype: Literal['float32', 'bfloat16', 'float16'] = Field('float16', description='Of the weights in the checkpoint.')
    seed: int = Field(0, ge=0, description='Of fresh weights and of every draw of the training.')
    threads: int = Field(1, gt=0, description='Threads of torch per process.')
    workers: int = Field(0, ge=0, description='Processes that prepare examples; 0 does it in the training process.')

    @model_validator(mode='after')
    def _consistent(self) -> TrainingConfig:
        if self.optimisation.optimizer == 'muon' and self.sharding == 'fsdp':
            raise ValueError('optimisation.optimizer muon needs the matrices whole: set it to adamw, or sharding to none')
        if self.preset is None and self.start_from is None:
            raise ValueError('give preset (train from nothing) or start_from (a checkpoint)')
        if self.transfer_from is not None and (self.preset is None or self.start_from is not None):
            raise ValueError('transfer_from goes with preset, the size of that checkpoint, and without start_from')
        if self.transfer_groups is not None and self.transfer_from is None:
            raise ValueError('transfer_groups needs transfer_from, the checkpoint to take them from')
        if 'heads' in (self.transfer_groups or ()):
            raise ValueError('transfer_groups names heads, which belong to the training and are in no checkpoint: remove it')
        if self.start_from is not None and self.network:
            raise ValueError('network changes the sizes of a preset; those of start_from are fixed: remove network')
        if self.keep_statistics and self.start_from is None:
            raise ValueError('keep_statistics needs start_from, whose statistics to keep')
        if self.frozen_dtype == 'bfloat16' and self.precision == 'float32':
            raise ValueError('frozen_dtype bfloat16 needs precision bfloat16: float32 products cannot take such weights')
        if self.lora is not None and self.freeze.language:
            raise ValueError('lora adapts the language layers, freeze.language keeps them: remove one of the two')
        return self

    def identity(self) -> dict[str, Any]:
        """Flat ``place -> value`` of all that the result depends on, apart from the number of steps."""
        flat = _flattened(self.model_dump(mode='json'))
        return {place: value for place, value in flat.items() if place.split('.')[0] not in _FREE and place not in _FREE}


# What may differ between a run and its continuation: where and how often things are written, and how far the run goes.
_FREE = (
    'run', 'out', 'logging', 'threads', 'workers', 'save_dtype', 'sharding', 'robot', 'start_from', 'transfer_from',
    'optimisation.steps', 'data.folder', 'data.visited.by', 'data.path', 'data.files', 'data.validation_files',
    'data.validation_examples',
)  # fmt: skip


def _flattened(data: dict[str, Any], place: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flattened(value, f'{place}{key}.')
        else:
            flat[f'{place}{key}'] = value
    return flat


def load_training(path: str | Path, changes: Sequence[str] = ()) -> TrainingConfig:
    """Read a training file, change single values (``optimisation.steps=100``), and validate.

    Raises:
        SchemaError: the file is missing, is not YAML, or breaks the schema; a change has no ``=``, or no such place.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f'training file {path}: cannot be read ({error}); give the path of a YAML training file') from error
    data = parse_mapping(text, TrainingConfig, str(path))
    for change in changes:
        _apply(data, change)
    return validate_mapping(data, TrainingConfig, str(path))


def _apply(data: dict[str, Any], change: str) -> None:
    place, equals, text = change.partition('=')
    if not equals or not place:
        raise SchemaError(f'change {change!r} is not of the form key=value, such as optimisation.steps=100')
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise SchemaError(f'change {change!r}: the value is not YAML: {error}') from error
    *sections, key = place.split('.')
    for section in sections:
        inner = data.get(section)
        if inner is None:
            inner = data[section] = {}
        if not isinstance(inner, dict):
            raise SchemaError(f'change {change!r}: {section!r} is a value, not a section')
        data = inner
    data[key] = value
