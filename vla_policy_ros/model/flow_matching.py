"""Flow matching over action chunks: the action expert's heads, its loss and its sampler.

Convention (time runs from noise to data as t goes from 1 to 0):

    x_t = t * noise + (1 - t) * actions          u = noise - actions
    loss = mean (v(x_t, t) - u)^2                 sampling: x <- x - v(x, t_k) / K,  t_k = 1 - k / K,  k = 0 .. K - 1

Positions in the suffix: ``[state?] [action 1 .. action T] [time?]``. Everything that is integrated or compared is float32, whatever
the network computes in; the time embedding needs it, since its fastest period is four thousandths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_policy_ros.model.attention import boolean_mask
from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.model.deep_fusion import LLaVA3DWithActionExpertModel, PrefixCache
from vla_policy_ros.model.initial import start_as


@dataclass(frozen=True)
class SuffixLayout:
    """Which suffix row is what; the only place that knows."""

    has_state: bool
    horizon: int
    has_time: bool

    @property
    def length(self) -> int:
        """Suffix tokens."""
        return self.horizon + int(self.has_state) + int(self.has_time)

    @property
    def actions(self) -> slice:
        """Rows of the action tokens, first action first."""
        return slice(int(self.has_state), int(self.has_state) + self.horizon)

    def block_starts(self, suffix_attention: str) -> list[int]:
        """0/1 per row: where the mask rule opens a new block."""
        if suffix_attention == 'causal':
            return [1] * self.length
        starts = [1] + [0] * (self.length - 1)
        if suffix_attention == 'state_block' and self.has_state:
            starts[1] = 1
        return starts


def time_embedding(time: Tensor, width: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """Sine half then cosine half of ``2 pi t / period`` for geometrically spaced periods, float32 ``[*time.shape, width]``."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = time.to(torch.float64)[..., None] * (2.0 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(torch.float32)


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """``x_t`` and its velocity ``u`` for actions and noise ``[B, T, A]`` and time ``[B]``."""
    t = time[:, None, None]
    return t * noise + (1.0 - t) * actions, noise - actions


def euler(velocity: Callable[[Tensor, int], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """Integrate ``dx/dt = velocity(x, step)`` from t = 1 to 0 in ``num_steps`` steps; step k stands for t = 1 - k / num_steps."""
    if num_steps < 1:
        raise ValueError(f'num_steps is {num_steps}; at least one step is needed')
    x = noise
    for step in range(num_steps):
        x = x - velocity(x, step) / num_steps
    return x


class FlowMatchingActionExpert(nn.Module):
    """Turns noise into an action chunk, conditioned on a prefix through `LLaVA3DWithActionExpertModel`.

    The backbone is borrowed, not registered (its owner saves it). Inputs and results are in the normalised action space.

    Args:
        llava_with_expert: the two-stream backbone.
        config: sizes, time conditioning and sampling.
    """

    def __init__(self, llava_with_expert: LLaVA3DWithActionExpertModel, config: ActionExpertConfig) -> None:
        super().__init__()
        self._borrowed = (llava_with_expert,)
        self.config = config
        self.use_state = config.use_state
        width = config.hidden_size
        mixes_time = config.time_conditioning == 'concat_mlp'
        self.layout = SuffixLayout(config.use_state, config.action_horizon, not mixes_time)
        self.state_proj = nn.Linear(config.state_dim, width) if config.use_state and config.state_dim else None
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.time_mlp_in = nn.Linear(2 * width if mixes_time else width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = start_as(nn.Linear(width, config.action_dim), 0.0)

    @property
    def backbone(self) -> LLaVA3DWithActionExpertModel:
        """The borrowed two-stream backbone."""
        return self._borrowed[0]

    def compute_loss(
        self,
        prefix_embs: Tensor | None,
        actions: Tensor,
        state: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prefix_past_key_values: PrefixCache | None = None,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
        action_is_pad: Tensor | None = None,
        repeats: int = 1,
        reduction: str = 'mean',
    ) -> Tensor:
        """Flow-matching loss of ``actions`` ``[B, T, A]``.

        Args:
            prefix_embs: ``[B, Lp, D]``, run through the language model here; may be None where the cache is given.
            actions: normalised targets.
            state: normalised ``[B, S]``; needed exactly when the expert uses a state token.
            attention_mask: joint mask ``[B, 1, L, L]``, boolean or additive.
            position_ids: joint positions ``[B, L]``.
            prefix_past_key_values: cache of a prefix pass that was already made.
            noise: ``[B * repeats, T, A]``; drawn where None.
            time: ``[B * repeats]`` in [0, 1]; drawn where None.
            generator: source of the draws.
            action_is_pad: bool ``[B, T]``: steps beyond the episode's end, left out of the loss.
            repeats: independent (noise, time) draws per prefix.
            reduction: ``mean`` for a float32 scalar, ``none`` for squared errors ``[B * repeats, T, A]`` (0 at padded steps).

        Raises:
            ValueError: a shape or a value is not what the configuration says.
        """
        self._check(actions, state)
        batch = len(actions)
        actions = actions.float().repeat_interleave(repeats, dim=0)
        if noise is None:
            noise = torch.randn(actions.shape, device=actions.device, generator=generator)
        if time is None:
            time = self.sample_time(len(actions), actions.device, generator)
        if noise.shape != actions.shape or time.shape != (len(actions),):
            raise ValueError(
                f'noise is {tuple(noise.shape)} and time {tuple(time.shape)}; for these targets they must be '
                f'{tuple(actions.shape)} and {(len(actions),)}'
            )
        if action_is_pad is not None and action_is_pad.shape != (batch, actions.shape[1]):
            raise ValueError(f'action_is_pad is {tuple(action_is_pad.shape)}; it must be {(batch, actions.shape[1])}')
        x, target = interpolate(actions, noise.float(), time.float())
        condition = self._prepare(prefix_embs, state, attention_mask, position_ids, prefix_past_key_values, batch)
        embedded = self._time_features(time)
        velocity = self._velocity(x, embedded, condition)
        error = (velocity - target).square()
        if action_is_pad is not None:
            keep = ~action_is_pad.repeat_interleave(repeats, dim=0)[:, :, None]
            error = error * keep
            if reduction == 'mean':
                return error.sum() / (keep.sum() * error.shape[-1]).clamp_min(1)
        return error.mean() if reduction == 'mean' else error

    @torch.no_grad()
    def sample_actions(
        self,
        prefix_embs: Tensor | None,
        state: Tensor | None = None,
        num_steps: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prefix_past_key_values: PrefixCache | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw one chunk ``[B, T, A]`` (float32, normalised) per prefix.

        Arguments are those of `compute_loss`; ``num_steps`` defaults to the configuration's. Without a cache the prefix pass is
        made here, once.
        """
        steps = self.config.num_inference_steps if num_steps is None else num_steps
        source = prefix_embs if prefix_embs is not None else (prefix_past_key_values or ((None,),))[0][0]
        if source is None:
            raise ValueError('give prefix_embs or prefix_past_key_values')
        batch, shape = len(source), (self.config.action_horizon, self.config.action_dim)
        if noise is None:
            noise = torch.randn((batch, *shape), device=source.device, generator=generator)
        self._check(noise, state)
        condition = self._prepare(prefix_embs, state, attention_mask, position_ids, prefix_past_key_values, batch)
        times = 1.0 - torch.arange(steps, dtype=torch.float32, device=source.device) / steps
        embedded = self._time_features(times)

        def velocity(x: Tensor, step: int) -> Tensor:
            return self._velocity(x, embedded[step].expand(batch, -1), condition)

        return euler(velocity, noise.float(), steps)

    def sample_time(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """``[count]`` times of the configured distribution; for beta = 1 by inverting its distribution function."""
        uniform = torch.rand(count, device=device, generator=generator)
        config = self.config
        if config.time_sampling == 'uniform':
            return uniform
        if config.time_beta == 1.0:
            draw = uniform ** (1.0 / config.time_alpha)
        else:
            first = torch._standard_gamma(torch.full_like(uniform, config.time_alpha), generator=generator)
            second = torch._standard_gamma(torch.full_like(uniform, config.time_beta), generator=generator)
            draw = first / (first + second)
        return config.time_scale * draw + config.time_offset

    def _check(self, actions: Tensor, state: Tensor | None) -> None:
        expected = (self.config.action_horizon, self.config.action_dim)
        if actions.dim() != 3 or tuple(actions.shape[1:]) != expected:
            raise ValueError(f'actions are {tuple(actions.shape)}; expected [batch, {expected[0]}, {expected[1]}]')
        if self.use_state:
            if state is None:
                raise ValueError(f'this model has a state token; give state [batch, {self.config.state_dim}]')
            if state.dim() != 2 or state.shape[1] != self.config.state_dim:
                raise ValueError(f'state is {tuple(state.shape)}; expected [batch, {self.config.state_dim}]')
        for name, value in (('actions', actions), ('state', state if self.use_state else None)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f'{name} contain NaN or infinite values')

    def _prepare(
        self,
        prefix_embs: Tensor | None,
        state: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: PrefixCache | None,
        batch: int,
    ) -> _Condition:
        """Everything that one chunk needs once: cache, suffix mask, rotary tables, state token."""
        if attention_mask is None or position_ids is None:
            raise ValueError('give the joint attention_mask and position_ids of prefix and suffix')
        if cache is None:
            if prefix_embs is None:
                raise ValueError('give prefix_embs or prefix_past_key_values')
            cache = self.backbone.prefix_pass(prefix_embs, attention_mask, position_ids, cache_only=True).cache
        if len(cache[0].key) != batch:
            raise ValueError(f'the prefix has batch {len(cache[0].key)}, the actions have batch {batch}')
        length = self.layout.length
        allowed = boolean_mask(attention_mask)[:, :, -length:]
        like = cache[0].key
        rotary = self.backbone.rotary(like, position_ids[:, -length:])
        token = None
        if self.state_proj is not None and state is not None:
            token = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None]
        return _Condition(cache, allowed, rotary, token)

    def _time_features(self, time: Tensor) -> Tensor:
        """Per time ``[n]``: the time token ``[n, E]``, or the raw embedding that `concat_mlp` mixes in."""
        config = self.config
        embedded = time_embedding(time, config.hidden_size, config.time_min_period, config.time_max_period)
        embedded = embedded.to(self.time_mlp_in.weight.dtype)
        if config.time_conditioning == 'concat_mlp':
            return embedded
        return self.time_mlp_out(F.silu(self.time_mlp_in(embedded)))

    def _suffix(self, x: Tensor, time: Tensor, state_token: Tensor | None) -> Tensor:
        """Suffix embeddings ``[B * R, Ls, E]`` in the order of `layout`."""
        tokens = self.action_in_proj(x.to(self.action_in_proj.weight.dtype))
        if self.config.time_conditioning == 'concat_mlp':
            mixed = torch.cat((tokens, time[:, None].expand_as(tokens).to(tokens.dtype)), dim=-1)
            parts = [self.time_mlp_out(F.silu(self.time_mlp_in(mixed)))]
        else:
            parts = [tokens, time[:, None].to(tokens.dtype)]
        if state_token is not None:
            repeats = len(x) // len(state_token)
            parts.insert(0, state_token.repeat_interleave(repeats, dim=0) if repeats > 1 else state_token)
        return torch.cat(parts, dim=1)

    def _velocity(self, x: Tensor, time: Tensor, condition: _Condition) -> Tensor:
        suffix = self._suffix(x, time, condition.state_token)
        hidden = self.backbone.suffix_pass(suffix, condition.cache, condition.allowed, condition.rotary)
        read_out = hidden[:, self.layout.actions]
        return self.action_out_proj(read_out.to(self.action_out_proj.weight.dtype)).float()


@dataclass(frozen=True)
class _Condition:
    """What stays the same for all integration steps of a chunk."""

    cache: PrefixCache
    allowed: Tensor
    rotary: tuple[Tensor, Tensor]
    state_token: Tensor | None
