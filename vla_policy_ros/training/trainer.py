"""The training loop: gradient steps, a moving average of the weights, measurements, and a state to resume from.

One step takes a few scenes and all their examples: the towers see each picture once, the language model sees each sentence once,
and the expert sees several (noise, time) draws per prefix. Everything random follows from the seed and the step number, so that an
interrupted run continues as if it had not been interrupted, and several processes take the steps that one would take.

Enters: a model, its processor, scenes, a training configuration. Leaves: trained weights, a log, states. The thread that trains.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.model.statistics import Normalizer, Statistics
from vla_policy_ros.training.baselines import unconditional_loss, zero_velocity_loss
from vla_policy_ros.training.config import Optimisation, TrainingConfig
from vla_policy_ros.training.ema import MovingAverage
from vla_policy_ros.training.objective import Objective, with_draws
from vla_policy_ros.training.optimizer import RunOptimizer
from vla_policy_ros.training.parallel import Parallel
from vla_policy_ros.training.parameters import choose_trainable, trained
from vla_policy_ros.training.progress import ProgressLog
from vla_policy_ros.training.scenes import Collator, Draw, SceneDataset, StepPlan, derived_seed
from vla_policy_ros.training.state import StateError, load_tensors, newest_state, save_state

VALIDATION_SCENES = 8
VALIDATION_EXAMPLES = 240

ADDED_LATER: dict[str, Any] = {'optimisation.optimizer': 'adamw'}
"""What runs were made with that were begun before a training file could say it."""


def fit_statistics(scenes: SceneDataset, processor: MapAnythingLlava3DProcessor, mode: str = 'zscore') -> Statistics:
    """Normalisers of the state ``[S]`` and of the (possibly relative) actions per step and joint ``[T, A]``."""
    data = scenes.trajectories()
    actions = processor.relative_actions(data.actions, data.state)
    return Statistics(Normalizer.fit(mode, data.state), Normalizer.fit(mode, actions))


class Trainer:
    """Trains one model on one dataset.

    Args:
        model: the network; trained in place.
        processor: its processor, whose statistics were fitted to ``scenes`` or come with the weights.
        scenes: training scenes.
        config: how to train; folders and data of it are not read.
        run_folder: where the log and the states go.
        validation: held-out scenes, or None.
        start: what identifies the weights that the model came with, where they are not fresh.
        parallel: the processes, where they are set up already.

    Raises:
        ValueError: the scenes of a step cannot be shared by the processes, or a loss has no labels.
    """

    def __init__(
        self,
        model: MapAnythingLlava3DForConditionalGeneration,
        processor: MapAnythingLlava3DProcessor,
        scenes: SceneDataset,
        config: TrainingConfig,
        run_folder: Path,
        validation: SceneDataset | None = None,
        start: str = '',
        parallel: Parallel | None = None,
    ) -> None:
        self.model, self.processor, self.scenes, self.validation = model, processor, scenes, validation
        self.config, self.options, self.folder = config, config.optimisation, run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        if model.action_expert is None:
            raise ValueError('this network has no action expert (use_action_expert is False); only actions can be trained here')
        self._expert = model.action_expert
        self.parallel = parallel or Parallel(config)
        options = self.options
        share = self.parallel.world * options.gradient_accumulation
        if options.scenes_per_step % share:
            raise ValueError(
                f'optimisation.scenes_per_step is {options.scenes_per_step}; it must be a multiple of {share} '
                f'({self.parallel.world} processes, gradient_accumulation {options.gradient_accumulation})'
            )
        self.plan = StepPlan(len(scenes), options.scenes_per_step, config.seed)
        self.collate = Collator(processor)
        self.objective = Objective(model, config.losses.weights(), options.repeats, config.seed, config.losses.grounding_layer)
        self.objective.check_labels(self.collate([scenes[Draw(0, 0)]]))
        choose_trainable(self.objective, config)
        if self.parallel.device.type == 'cpu':
            # Plain matrix products: the fused kernel's backward pass is several times slower on a CPU.
            model.vision_tower.set_attn_implementation('eager')
        if config.gradient_checkpointing:
            # The name that all supported versions of transformers know.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
        self.parallel.wrap(self.objective)
        self.parameters = trained(self.objective)
        self.average = MovingAverage(list(self.parameters.values()), options.ema)
        self.optimizer = RunOptimizer(self.parameters, options, self.parallel.rank, self.parallel.world)
        self.step = 0
        data = scenes.trajectories()
        actions = processor.normalize_actions(data.actions, data.state).double().numpy()
        self.baselines = {
            'zero_velocity': zero_velocity_loss(actions, data.action_is_pad),
            'unconditional': unconditional_loss(actions, model.config.expert_config),
        }
        self.made_of = {
            **config.identity(),
            'the examples': scenes.digest(),
            'the statistics': processor.statistics.digest,
            'the network': hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode()).hexdigest(),
            'the weights of start_from': start,
        }

    def run(self, on_checkpoint: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train until ``optimisation.steps``.

        ``on_checkpoint`` is called with the newest validation, and the averaged weights in place, by every process.
        """
        steps, logging = self.options.steps, self.config.logging
        with ProgressLog(self.folder, self.step, steps, tensorboard=logging.tensorboard, active=self.parallel.main) as log:
            log.row('start', self.step, {'baselines': self.baselines, 'scenes': len(self.scenes), **self._sizes()})
            window = _Window()
            newest: dict[str, Any] = {}
            self.objective.train()
            batches = self._batches()
            while self.step < steps:
                window.add(*self._train_step(batches))
                self.step += 1
                last = self.step == steps
                log.step(self.step)
                if self.step % logging.log_every == 0 or last:
                    log.row('train', self.step, self._summary(window.means(self.parallel), self.baselines['zero_velocity']))
                    window = _Window()
                if self.validation is not None and (self.step % logging.validate_every == 0 or last):
                    with self.averaged_weights():
                        newest = self.validate(self.validation)
                    log.row('validation', self.step, newest)
                if self.step % logging.state_every == 0 or last:
                    self.save_state()
                due = logging.checkpoint_every is not None and self.step % logging.checkpoint_every == 0
                if on_checkpoint is not None and (due or last):
                    with self.averaged_weights():
                        on_checkpoint({'step': self.step, 'validation': newest})
            self.objective.eval()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model evaluates with the moving average of its weights inside."""
        self.objective.eval()
        with self.average.in_place():
            yield
            self.parallel.release()
        self.objective.train()

    @torch.no_grad()
    def validate(self, scenes: SceneDataset) -> dict[str, Any]:
        """What training measures, on held-out examples with fixed draws, and the mean error of sampled chunks in robot units."""
        chosen: list[Draw] = []
        seen = 0
        while len(chosen) < len(scenes) and seen < VALIDATION_EXAMPLES:
            seen += scenes.examples_in(len(chosen))
            chosen.append(Draw(len(chosen), derived_seed(self.config.seed, 'validation', len(chosen))))
        chunks = [chosen[first : first + VALIDATION_SCENES] for first in range(0, len(chosen), VALIDATION_SCENES)]
        window, world = _Window(), self.parallel.world
        for turn in range(-(-len(chunks) // world)):
            index = turn * world + self.parallel.rank
            # Every process makes the same number of passes; what is too much does not count.
            draws = chunks[min(index, len(chunks) - 1)]
            batch = with_draws(self.collate([scenes[draw] for draw in draws]), self._expert, self.options.repeats)
            measured = self.parallel(batch)
            measured.pop('loss')
            if self.objective.acts:
                measured['action_error'] = self._action_error(batch)
            window.add(measured, len(batch['state']) if index < len(chunks) else 0)
        data = scenes.trajectories()
        actions = self.processor.normalize_actions(data.actions, data.state).double().numpy()
        means = window.means(self.parallel)
        means.pop('samples_per_s')
        return self._summary(means, zero_velocity_loss(actions, data.action_is_pad))

    def _action_error(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean absolute error of sampled chunks, robot units."""
        chunk = self.parallel.sample(batch)
        made = self.processor.unnormalize_actions(chunk, batch['robot_state'].numpy())
        error = torch.from_numpy(np.abs(made - batch['robot_actions'].numpy()))
        counted = ~batch['action_is_pad'] if 'action_is_pad' in batch else torch.ones(error.shape[:2], dtype=torch.bool)
        return error[counted].mean().float().to(self.parallel.device)

    def save_state(self) -> None:
        """Write everything that `resume` needs."""
        parallel = self.parallel
        self.optimizer.gather()
        save_state(self.folder, self.step, self._tensors(), self.made_of, parallel.rank, parallel.world, parallel.wait)

    def resume(self) -> bool:
        """Continue from the newest state in the run folder; False where there is none.

        Raises:
            StateError: the state is damaged, or belongs to another configuration, other data or other weights.
        """
        state = newest_state(self.folder, check=self.parallel.main)
        if state is None:
            return False
        _check_same_run(state.run, self.made_of, self.folder)
        if state.step > self.options.steps:
            raise StateError(
                f'{self.folder} has {state.step} steps behind it, optimisation.steps is {self.options.steps}: ask for more, '
                'or use another run folder'
            )
        load_tensors(state, self._tensors(), self.parallel.rank, self.parallel.world)
        self.step = state.step
        return True

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes in training, by name; of a sharded run the sharded tensors."""
        tensors: dict[str, Tensor] = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            tensors[f'weight/{name}'] = parameter
            if self.average.decay:
                tensors[f'average/{name}'] = self.average.like(index, parameter)
            for kind, value in self.optimizer.state_of(parameter).items():
                tensors[f'{kind}/{name}'] = value
        return tensors

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches from the present step on, without draws."""
        plan = self.plan.parts(
            self.step, self.options.steps, self.parallel.rank, self.parallel.world, self.options.gradient_accumulation
        )
        return iter(
            DataLoader(
                self.scenes,  # type: ignore[arg-type]
                batch_sampler=plan,
                collate_fn=self.collate,
                num_workers=self.config.workers,
                generator=torch.Generator(),
            )
        )

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
        """One optimiser step; its measurements, averaged over this process's examples, and their number."""
        options, parallel = self.options, self.parallel
        for group in self.optimizer.groups:
            group['lr'] = learning_rate(self.step, group['peak'], options)
        self.objective.zero_grad(set_to_none=True)
        total = sum(self.scenes.examples_in(draw.scene) for draw in self.plan.step(self.step))
        window = _Window()
        for turn in range(options.gradient_accumulation):
            # What is drawn inside the network (dropout) depends on step, process and turn alone.
            torch.manual_seed(derived_seed(self.config.seed, 'network', self.step, parallel.rank, turn))
            batch = with_draws(next(batches), self._expert, options.repeats)
            examples = len(batch['state'])
            with parallel.accumulate(last=turn == options.gradient_accumulation - 1):
                measured = parallel(batch)
                # Processes average their gradients; each counts by its share of the step's examples.
                parallel.backward(measured['loss'] * (examples * parallel.world / total))
            window.add(measured, examples)
        norm = parallel.clip_gradients(self.parameters.values(), options.clip_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f'step {self.step}: the norm of the gradient is {float(norm)}; lower the learning rate')
        self.optimizer.step()
        self.average.update(self.step)
        return {**window.local_means(), 'grad_norm': norm}, window.count

    def _summary(self, means: dict[str, Tensor], zero_velocity: float) -> dict[str, Any]:
        """Measurements as plain numbers, with what is derived from them."""
        count, total = means.pop('cosine_count', None), means.pop('cosine_sum', None)
        row: dict[str, Any] = {name: value.tolist() for name, value in means.items()}
        if count is not None and total is not None:
            row['ratio'] = row['flow'] / zero_velocity
            row['cosine'] = [float(part / seen) if seen > 0 else None for part, seen in zip(total, count, strict=True)]
        if 'grad_norm' in row:
            row['lr'] = learning_rate(self.step - 1, self.options.learning_rate, self.options)
        return row

    def _sizes(self) -> dict[str, int]:
        """How many weights there are, and how many are trained."""
        return {
            'weights': sum(parameter.numel() for parameter in self.objective.parameters()),
            'trained_weights': sum(parameter.numel() for parameter in self.parameters.values()),
            'processes': self.parallel.world,
        }


class _Window:
    """Measurements of some steps, averaged over their examples."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._began = time.perf_counter()
        self.count = 0

    def add(self, measured: dict[str, Tensor], examples: int) -> None:
        self.count += examples
        for name, value in measured.items():
            total = value.detach().float() * examples
            self._totals[name] = total if name not in self._totals else self._totals[name] + total

    def mean(self, name: str) -> Tensor:
        return self._totals[name] / max(1, self.count)

    def local_means(self) -> dict[str, Tensor]:
        return {name: self.mean(name) for name in self._totals}

    def means(self, parallel: Parallel) -> dict[str, Tensor]:
        """Over all processes, with ``samples_per_s``."""
        seconds = time.perf_counter() - self._began
        count = parallel.sum(torch.tensor(float(self.count)))
        means = {name: parallel.sum(total) / count for name, total in self._totals.items()}
        return {**means, 'samples_per_s': count / seconds}


def learning_rate(step: int, peak: float, options: Optimisation) -> float:
    """Linear warm-up to ``peak``, then a cosine down to ``final_fraction`` of it."""
    if step < options.warmup_steps:
        return peak * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (options.final_fraction + (1.0 - options.final_fraction) * cosine)


def _check_same_run(saved: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    saved = {**ADDED_LATER, **saved}
    for place in [*mine, *(place for place in saved if place not in mine)]:
        if saved.get(place) != mine.get(place):
            raise StateError(
                f'{place} is {mine.get(place)!r}; the run in {folder} has {saved.get(place)!r}: use that value to continue it, '
                'or another run folder'
            )
