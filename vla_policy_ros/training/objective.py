"""What is minimised: the flow loss and the auxiliary losses of one batch, in one differentiable call.

Everything that needs gradients happens inside `Objective.forward`, the towers too, so that a wrapper of parallel training (DDP,
FSDP) sees all of it. The auxiliary heads belong to the objective; the checkpoint does not contain them.

Enters: a batch of `scenes.Collator` with the draws of `with_draws`. Leaves: the loss and named measurements. The thread that
trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_policy_ros.model.flow_matching import FlowLoss, FlowMatchingActionExpert
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.training.grounding import GroundingHead
from vla_policy_ros.training.perception import LOSS_WEIGHTS, PerceptionHead
from vla_policy_ros.training.scenes import derived_seed

TIME_BINS = 4
_PREFIX = ('input_ids', 'attention_mask', 'image_token_mask', 'instruction_token_mask', 'state')


@dataclass(frozen=True)
class Seen:
    """What auxiliary heads may look at; N are the vision patches of a camera, row by row.

    Attributes:
        image_tokens: fused image tokens of each scene, before any word is read, ``[M, V, N, D]``.
        prefix_tokens: the same positions of each example as a language layer receives them, ``[B, V, N, D]``; None where only the
            pictures are looked at.
    """

    image_tokens: Tensor
    prefix_tokens: Tensor | None


class Auxiliary(nn.Module, ABC):
    """A head with its loss.

    Attributes:
        needs: labels that it reads from the batch.
        of_prefix: whether it looks at `Seen.prefix_tokens`.
    """

    needs: tuple[str, ...] = ()
    of_prefix = False

    @abstractmethod
    def measure(self, seen: Seen, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``, and what to log beside it."""

    def forward(self, seen: Seen, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `measure` answers. Every process gets a gradient for every weight, whatever its examples show."""
        made = self.measure(seen, batch)
        return {**made, 'loss': made['loss'] + sum(weight.sum() * 0.0 for weight in self.parameters())}


class Grounding(Auxiliary):
    """Where the named object is, from the prefix; needs ``target_pixels``."""

    needs = ('target_pixels',)
    of_prefix = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head = GroundingHead(config.hidden_size, config.vision_config.patch_size, config.image_grid)

    def measure(self, seen: Seen, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``, and what to log beside it."""
        assert seen.prefix_tokens is not None  # `of_prefix`
        made = self.head(seen.prefix_tokens, batch['target_pixels'])
        return {'loss': made.total, 'patch': made.patch.detach(), 'accuracy': made.accuracy}


class Perception(Auxiliary):
    """What lies where and how far away, from the image tokens before any word is read; needs the labels of a simulator."""

    needs = ('object_kinds', 'object_pixels', 'object_points', 'depth')

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head = PerceptionHead(config.hidden_size, config.vision_config.patch_size, config.image_grid)

    def measure(self, seen: Seen, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss``, and what to log beside it."""
        made = self.head(seen.image_tokens, *(batch[name] for name in self.needs))
        loss = sum((weight * made[name] for name, weight in LOSS_WEIGHTS.items()), torch.zeros(()))
        return {'loss': loss, **{name: value.detach() for name, value in made.items()}}


AUXILIARY: dict[str, type[Any]] = {'grounding': Grounding, 'perception': Perception}


class Objective(nn.Module):
    """The model, the auxiliary heads, and their weighted loss.

    Args:
        model: the network.
        weights: name in `AUXILIARY`, or ``flow``, to factor; a loss of factor 0 is left out. Without the flow loss and losses of
            the prefix, only the towers run.
        repeats: (noise, time) draws per prefix.
        seed: of the heads' fresh weights.
        layer: the language layer whose input the losses of the prefix look at; negative ones count from the last.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(
        self, model: MapAnythingLlava3DForConditionalGeneration, weights: dict[str, float], repeats: int, seed: int, layer: int = -1
    ) -> None:
        super().__init__()
        layers = model.config.text_config.num_hidden_layers
        if not -layers <= layer < layers:
            raise ValueError(f'losses.grounding_layer is {layer}; the network has the language layers 0 to {layers - 1}')
        self.layer = layer
        self.model, self.repeats = model, repeats
        self.flow = weights['flow']
        self.weights = {name: weight for name, weight in weights.items() if weight > 0.0 and name != 'flow'}
        self.acts = self.flow > 0.0 or any(AUXILIARY[name].of_prefix for name in self.weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({name: AUXILIARY[name](model.config) for name in self.weights})

    def check_labels(self, batch: dict[str, Tensor]) -> None:
        """Raises ValueError where an auxiliary loss has no labels in such batches."""
        for name in self.heads:
            missing = [label for label in AUXILIARY[name].needs if label not in batch]
            if missing:
                raise ValueError(f'losses.{name} needs {missing[0]}, which these examples have not: set losses.{name} to 0')

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and detached measurements: means over the batch unless said otherwise.

        ``loss``: float32 scalar with gradients. ``flow`` (where the network acts); ``<head>`` and ``<head>_<measurement>`` of each
        auxiliary loss; ``loss_per_dim [A]``; ``cosine_sum`` and ``cosine_count`` ``[TIME_BINS]``: cosines between predicted and
        true velocity by bins of t, from 0 to 1.
        """
        features = self._image_features(batch)
        loss, measured, hidden = features.new_zeros(()).float(), {}, None
        if self.acts:
            output = self.model(
                **self._inputs(batch, features),
                actions=batch['actions'],
                action_is_pad=batch.get('action_is_pad'),
                noise=batch['noise'],
                time=batch['time'],
                delay=batch.get('delay'),
                repeats=self.repeats,
                output_hidden_states=bool(self.heads),
            )
            loss, hidden = self.flow * output.loss, output.hidden_states[self.layer] if self.heads else None
            measured = {'flow': output.loss.detach(), **_flow_measurements(output.flow)}
        if self.heads:
            seen = self._seen(batch, features, hidden)
            for name, head in self.heads.items():
                made = head(seen, batch)
                part = made.pop('loss')
                loss = loss + self.weights[name] * part
                measured |= {name: part.detach(), **{f'{name}_{key}': value.detach() for key, value in made.items()}}
        return {'loss': loss, **measured}

    @torch.no_grad()
    def sample(self, batch: dict[str, Tensor]) -> Tensor:
        """A chunk ``[B, T, A]`` per example, float32 and normalised, from the first draw of its noise."""
        return self.model.predict_action(self._inputs(batch, self._image_features(batch)), noise=batch['noise'][:: self.repeats])

    def _image_features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.get_image_features(
            batch['pixel_values'], batch['intrinsic'], batch['intrinsic_mask'], batch['image_masks']
        )

    @staticmethod
    def _inputs(batch: dict[str, Tensor], features: Tensor) -> dict[str, Tensor]:
        row = batch['scene']
        return {
            **{name: batch[name] for name in _PREFIX},
            'image_features': features[row],
            'image_masks': batch['image_masks'][row],
        }

    def _seen(self, batch: dict[str, Tensor], features: Tensor, hidden: Tensor | None) -> Seen:
        views, patches = batch['image_masks'].shape[1], self.model.config.vision_seq_length
        pictures = features.unflatten(1, (views, -1))[:, :, :patches]
        if hidden is None:
            return Seen(pictures, None)
        tokens = hidden[batch['image_token_mask']].view(len(hidden), views, -1, hidden.shape[-1])
        return Seen(pictures, tokens[:, :, :patches])


def with_draws(batch: dict[str, Tensor], expert: FlowMatchingActionExpert, repeats: int) -> dict[str, Tensor]:
    """The batch with ``noise [B * R, T, A]``, ``time [B * R]`` and, for trained real-time chunking, ``delay``.

    Each scene draws from its own seed, so that the draws do not depend on how scenes are shared between processes.
    """
    counts = torch.bincount(batch['scene'], minlength=len(batch['seeds']))
    cpu, shape = torch.device('cpu'), batch['actions'].shape[1:]
    noise, time, delay = [], [], []
    for seed, count in zip(batch['seeds'].tolist(), counts.tolist(), strict=True):
        generator, rows = torch.Generator().manual_seed(derived_seed(seed, 'flow')), count * repeats
        noise.append(torch.randn((rows, *shape), generator=generator))
        time.append(expert.sample_time(rows, cpu, generator))
        delay.append(expert.sample_delay(rows, cpu, generator))
    drawn = {'noise': torch.cat(noise), 'time': torch.cat(time)}
    lengths = [length for length in delay if length is not None]
    return {**batch, **drawn, **({'delay': torch.cat(lengths)} if lengths else {})}


@torch.no_grad()
def _flow_measurements(flow: FlowLoss) -> dict[str, Tensor]:
    kept = torch.ones_like(flow.error[..., :1]) if flow.kept is None else flow.kept.to(flow.error.dtype)
    per_dimension = flow.error.sum(dim=(0, 1)) / kept.sum().clamp_min(1)
    cosine = torch.nn.functional.cosine_similarity((flow.velocity * kept).flatten(1), (flow.target * kept).flatten(1), dim=1)
    which = (flow.time * TIME_BINS).long().clamp_max(TIME_BINS - 1)
    count = torch.zeros(TIME_BINS, device=which.device).index_add_(0, which, torch.ones_like(flow.time))
    total = torch.zeros(TIME_BINS, device=which.device).index_add_(0, which, cosine)
    return {'loss_per_dim': per_dimension, 'cosine_sum': total, 'cosine_count': count}
