"""The training loop: flow loss plus grounding loss, AdamW with a cosine schedule, a moving average of the weights, resume.

One step takes a few scenes and all their examples: the towers see each picture once, the language model sees each sentence once,
and the expert sees several (noise, time) draws per prefix. Everything random follows from the seed and the step number, so that an
interrupted run continues as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.model.statistics import Normalizer, Statistics
from vla_policy_ros.training.baselines import unconditional_loss, zero_velocity_loss
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.grounding import GroundingHead, GroundingLoss

STATE_FILE = 'trainer_state.pt'
LOG_FILE = 'log.jsonl'


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        steps: optimiser steps of the whole run; the schedule stretches over them.
        scenes_per_step: scenes per step; a scene brings all its examples.
        repeats: (noise, time) draws per prefix.
        learning_rate, final_fraction, warmup_steps: cosine from the first to the product of the first two, after a linear start.
        weight_decay, betas, clip_norm: AdamW and gradient clipping.
        grounding_weight: factor of the grounding loss.
        ema: decay of the moving average that becomes the checkpoint.
        bfloat16: compute matrix products in bfloat16 (weights stay float32).
        log_every, validate_every, save_every: steps.
        seed: of every random draw.
    """

    steps: int = 3000
    scenes_per_step: int = 8
    repeats: int = 4
    learning_rate: float = 1e-3
    final_fraction: float = 0.02
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    grounding_weight: float = 0.2
    ema: float = 0.995
    bfloat16: bool = True
    log_every: int = 50
    validate_every: int = 500
    save_every: int = 250
    seed: int = 0


def fit_statistics(data: ExampleSet, processor: MapAnythingLlava3DProcessor, mode: str = 'zscore') -> Statistics:
    """Normalisers of the state ``[S]`` and of the (possibly relative) actions per step and joint ``[T, A]``."""
    state = data.state.numpy()
    actions = processor.relative_actions(data.actions.numpy(), state)
    return Statistics(Normalizer.fit(mode, state), Normalizer.fit(mode, actions))


@dataclass
class _Batch:
    inputs: dict[str, Tensor]
    actions: Tensor
    target_pixels: Tensor


class Trainer:
    """Trains one model on one example set.

    Args:
        model: the network; trained in place.
        processor: its processor, whose statistics were fitted to ``data``.
        data: training examples.
        options: how to train.
        run_folder: where the log and the resumable state go.
        validation: held-out examples, or None.
    """

    def __init__(
        self,
        model: MapAnythingLlava3DForConditionalGeneration,
        processor: MapAnythingLlava3DProcessor,
        data: ExampleSet,
        options: TrainingOptions,
        run_folder: Path,
        validation: ExampleSet | None = None,
    ) -> None:
        self.model, self.processor, self.data, self.options = model, processor, data, options
        self.validation = validation
        self.folder = run_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        # Plain matrix products: the fused kernel's backward pass is several times slower on a CPU.
        self.model.vision_tower.set_attn_implementation('eager')
        config = model.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.head = GroundingHead(config.hidden_size, config.vision_config.patch_size, config.image_grid)
        self._parameters = [*model.parameters(), *self.head.parameters()]
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        decay = [parameter for parameter in self._parameters if parameter.dim() > 1]
        plain = [parameter for parameter in self._parameters if parameter.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{'params': decay, 'weight_decay': options.weight_decay}, {'params': plain, 'weight_decay': 0.0}],
            lr=options.learning_rate,
            betas=options.betas,
            fused=True,
        )
        self._actions = processor.normalize_actions(data.actions.numpy(), data.state.numpy())
        self._of_scene = _examples_of_scenes(data)
        self.step = 0
        flat = self._actions.double().numpy()
        self.baselines = {
            'zero_velocity': zero_velocity_loss(flat),
            'unconditional': unconditional_loss(flat, config.expert_config),
        }

    def run(self, on_save: Callable[[], None] | None = None) -> None:
        """Train until ``options.steps``; write log, resumable state, and call ``on_save`` with the averaged weights in place."""
        options = self.options
        self._log(
            {
                'event': 'start',
                'step': self.step,
                'baselines': self.baselines,
                'options': asdict(options),
                'examples': len(self.data),
            }
        )
        began, spent = time.perf_counter(), time.process_time()
        window: list[dict[str, float]] = []
        self.model.train()
        while self.step < options.steps:
            window.append(self._train_step())
            self.step += 1
            if self.step % options.log_every == 0 or self.step == options.steps:
                mean = {name: float(np.mean([row[name] for row in window])) for name in window[0]}
                self._log(
                    {
                        'event': 'train',
                        'step': self.step,
                        **mean,
                        'cpu_s': time.process_time() - spent,
                        'wall_s': time.perf_counter() - began,
                    }
                )
                window = []
            last = self.step == options.steps
            if self.validation is not None and (self.step % options.validate_every == 0 or last):
                with self.averaged_weights():
                    self._log({'event': 'validation', 'step': self.step, **self.validate(self.validation)})
            if self.step % options.save_every == 0 or last:
                self.save_state()
                if on_save is not None:
                    with self.averaged_weights():
                        on_save()
        self.model.eval()

    def averaged_weights(self) -> _SwappedWeights:
        """Context in which the model holds the moving average of its weights."""
        return _SwappedWeights(self._parameters, self._average, self.model)

    @torch.no_grad()
    def validate(self, data: ExampleSet, limit: int = 240) -> dict[str, float]:
        """Flow and grounding loss on held-out examples with fixed draws, and the mean error of sampled chunks in robot units."""
        generator = torch.Generator().manual_seed(self.options.seed)
        of_scene, totals, seen = _examples_of_scenes(data), [], 0
        actions = self.processor.normalize_actions(data.actions.numpy(), data.state.numpy())
        for first in range(0, len(of_scene), 8):
            scenes = torch.arange(first, min(first + 8, len(of_scene)))
            batch = self._batch(data, of_scene, actions, scenes)
            loss, grounding = self._losses(batch, generator)
            chunk = self.model.predict_action(batch.inputs, generator=generator)
            examples = torch.cat([of_scene[int(scene)] for scene in scenes])
            state = data.state[examples].numpy()
            error = self.processor.unnormalize_actions(chunk, state) - data.actions[examples].numpy()
            parts = (loss, grounding.patch, grounding.accuracy)
            totals.append((*(float(part) for part in parts), float(np.abs(error).mean())))
            seen += len(examples)
            if seen >= limit:
                break
        names = ('flow', 'grounding', 'accuracy', 'action_error')
        return dict(zip(names, map(float, np.mean(totals, axis=0)), strict=True))

    def save_state(self) -> None:
        """Write everything that `resume` needs, all at once."""
        state: dict[str, Any] = {
            'step': self.step,
            'model': self.model.state_dict(),
            'head': self.head.state_dict(),
            'average': self._average,
            'optimizer': self._optimizer.state_dict(),
        }
        partial = self.folder / f'{STATE_FILE}.part'
        torch.save(state, partial)
        partial.rename(self.folder / STATE_FILE)

    def resume(self) -> bool:
        """Continue from the state in the run folder; False where there is none."""
        file = self.folder / STATE_FILE
        if not file.exists():
            return False
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state['model'])
        self.head.load_state_dict(state['head'])
        self._optimizer.load_state_dict(state['optimizer'])
        for mine, saved in zip(self._average, state['average'], strict=True):
            mine.copy_(saved)
        self.step = int(state['step'])
        return True

    def _train_step(self) -> dict[str, float]:
        options = self.options
        for group in self._optimizer.param_groups:
            group['lr'] = learning_rate(self.step, options)
        per_epoch = len(self._of_scene) // options.scenes_per_step
        epoch, index = divmod(self.step, max(1, per_epoch))
        order = torch.randperm(len(self._of_scene), generator=torch.Generator().manual_seed(options.seed * 1_000_003 + epoch))
        scenes = order[index * options.scenes_per_step : (index + 1) * options.scenes_per_step]
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        batch = self._batch(self.data, self._of_scene, self._actions, scenes)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=options.bfloat16):
            flow, grounding = self._losses(batch, generator)
            loss = flow + options.grounding_weight * grounding.total
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, options.clip_norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f'step {self.step}: gradient norm {float(norm)}, flow loss {float(flow)}; lower the learning rate'
            )
        self._optimizer.step()
        decay = min(options.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._parameters], 1.0 - decay)
        measured = {
            'flow': flow,
            'grounding': grounding.patch,
            'accuracy': grounding.accuracy,
            'norm': norm,
        }
        return {name: float(value.detach()) for name, value in measured.items()}

    def _losses(self, batch: _Batch, generator: torch.Generator) -> tuple[Tensor, GroundingLoss]:
        output = self.model(
            **batch.inputs, actions=batch.actions, repeats=self.options.repeats, generator=generator, output_hidden_states=True
        )
        tokens = output.hidden_states[-1][batch.inputs['image_token_mask']]
        count, views = batch.target_pixels.shape[:2]
        tokens = tokens.view(count, views, -1, tokens.shape[-1])[:, :, : self.model.config.vision_seq_length]
        return output.loss, self.head(tokens, batch.target_pixels)

    def _batch(self, data: ExampleSet, of_scene: list[Tensor], actions: Tensor, scenes: Tensor) -> _Batch:
        examples = torch.cat([of_scene[int(scene)] for scene in scenes])
        row = torch.cat([torch.full((len(of_scene[int(scene)]),), index) for index, scene in enumerate(scenes)])
        features = self.model.get_image_features(
            data.pixel_values[scenes], data.intrinsic[scenes], data.intrinsic_mask[scenes], data.image_masks[scenes]
        )
        inputs = {
            **self.processor.prompt_batch([data.instructions[int(example)] for example in examples]),
            'image_features': features[row],
            'image_masks': data.image_masks[scenes][row],
            'state': self.processor.normalize_state(data.state[examples].numpy()),
        }
        return _Batch(inputs, actions[examples], data.target_pixels[examples])

    def _log(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with (self.folder / LOG_FILE).open('a', encoding='utf-8') as handle:
            handle.write(line + '\n')


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then a cosine down to ``final_fraction``."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return options.learning_rate * (options.final_fraction + (1.0 - options.final_fraction) * cosine)


class _SwappedWeights:
    """Exchanges parameters with their average on entry, and back on exit; the model evaluates meanwhile."""

    def __init__(self, parameters: list[Tensor], average: list[Tensor], model: torch.nn.Module) -> None:
        self._parameters, self._average, self._model = parameters, average, model

    def __enter__(self) -> None:
        self._swap()
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._swap()
        self._model.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def _examples_of_scenes(data: ExampleSet) -> list[Tensor]:
    order = torch.argsort(data.scene, stable=True)
    counts = torch.bincount(data.scene, minlength=len(data.pixel_values))
    return [part for part in torch.split(order, counts.tolist()) if len(part)]
