"""Flow matching over action chunks: the action expert's heads, its loss and its sampler.

Convention (time runs from noise to data as t goes from 1 to 0):

    x_t = t * noise + (1 - t) * actions          u = noise - actions
    loss = mean (v(x_t, t) - u)^2                 sampling: integrate dx/dt = v from t = 1 to t = 0 (`solvers`)

Positions in the suffix: ``[state?] [action 1 .. action T] [time?]``. Everything that is integrated or compared is float32, whatever
the network computes in; the time embedding needs it, since its fastest period is four thousandths.

Actions that are known already (the prefix of trained real-time chunking, Black et al., arXiv 2512.05964) have a time of their own,
t = 0, and keep their value: the network sees them as clean data, and neither loss nor solver touches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_policy_ros.model.attention import boolean_mask, simplified_mask
from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.model.deep_fusion import LLaVA3DWithActionExpertModel, Modulation, PrefixCache
from vla_policy_ros.model.initial import start_as
from vla_policy_ros.model.real_time_chunking import RealTimeGuidance, guided
from vla_policy_ros.model.solvers import evaluation_times, integrate


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
    """``x_t`` and its velocity ``u`` for actions and noise ``[B, T, A]`` and time ``[B]`` or, per action, ``[B, T]``."""
    t = time[:, None, None] if time.dim() == 1 else time[:, :, None]
    return t * noise + (1.0 - t) * actions, noise - actions


@dataclass(frozen=True)
class TimeFeatures:
    """What the suffix needs of n times, computed once for all of them.

    Attributes:
        mixed: ``token``: the time token ``[n, E]``; ``concat_mlp``: the time's share of the mixing layer ``[n, E]``; else None.
        modulation: ``adarms``: tables of n rows; else None.
    """

    mixed: Tensor | None
    modulation: Modulation | None

    def at(self, rows: Tensor | slice) -> TimeFeatures:
        """The times ``rows``: a slice, long ``[B]``, or long ``[B, Ls]`` for one time per suffix token."""
        mixed = None if self.mixed is None else self.mixed[rows]
        return TimeFeatures(mixed, None if self.modulation is None else self.modulation.at(rows))


@dataclass(frozen=True)
class Conditioning:
    """What stays the same for all integration steps of a chunk."""

    cache: PrefixCache
    allowed: Tensor | None
    rotary: tuple[Tensor, Tensor]
    state_token: Tensor | None


@dataclass(frozen=True)
class FlowLoss:
    """What the loss was made of; n is B * repeats.

    Attributes:
        velocity, target: predicted and true velocity ``[n, T, A]``, float32.
        time: ``[n]``.
        kept: bool ``[n, T, 1]``, actions that count; None where all do.
        error: squared errors ``[n, T, A]``, weighted by time where the configuration says so, 0 where left out.
    """

    velocity: Tensor
    target: Tensor
    time: Tensor
    kept: Tensor | None
    error: Tensor

    def mean(self) -> Tensor:
        """float32 scalar: the mean error over all elements that count."""
        if self.kept is None:
            return self.error.mean()
        return self.error.sum() / (self.kept.sum() * self.error.shape[-1]).clamp_min(1)


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
        self.layout = SuffixLayout(config.use_state, config.action_horizon, config.time_conditioning == 'token')
        state_dim = config.state_dim if config.use_state else None
        self.state_proj = nn.Linear(state_dim, width) if state_dim else None
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
        delay: Tensor | None = None,
        repeats: int = 1,
        reduction: str = 'mean',
    ) -> Tensor:
        """Flow-matching loss of ``actions`` ``[B, T, A]``: arguments of `flow_loss`, and

        Args:
            reduction: ``mean`` for a float32 scalar, ``none`` for squared errors ``[B * repeats, T, A]`` (0 where left out).
        """
        made = self.flow_loss(
            prefix_embs,
            actions,
            state,
            attention_mask,
            position_ids,
            prefix_past_key_values,
            noise=noise,
            time=time,
            generator=generator,
            action_is_pad=action_is_pad,
            delay=delay,
            repeats=repeats,
        )
        return made.mean() if reduction == 'mean' else made.error

    def flow_loss(
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
        delay: Tensor | None = None,
        repeats: int = 1,
    ) -> FlowLoss:
        """The loss of ``actions`` ``[B, T, A]`` with the velocities behind it.

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
            delay: long ``[B * repeats]``: that many leading actions are given clean and left out of the loss; drawn uniformly
                from 0 .. ``rtc_max_delay`` where None.
            repeats: independent (noise, time, delay) draws per prefix.

        Raises:
            ValueError: a shape or a value is not what the configuration says.
        """
        self._check(actions, state)
        batch, horizon = actions.shape[:2]
        actions = actions.float().repeat_interleave(repeats, dim=0)
        rows = len(actions)
        if noise is None:
            noise = torch.randn(actions.shape, device=actions.device, generator=generator)
        if time is None:
            time = self.sample_time(rows, actions.device, generator)
        elif not bool(((time >= 0.0) & (time <= 1.0)).all()):
            raise ValueError(f'time is {time.tolist()}; it must lie in [0, 1]')
        if delay is None:
            delay = self.sample_delay(rows, actions.device, generator)
        if noise.shape != actions.shape or time.shape != (rows,) or (delay is not None and delay.shape != (rows,)):
            given = [None if value is None else tuple(value.shape) for value in (noise, time, delay)]
            raise ValueError(
                f'noise, time and delay are {given}; for these targets they must be {tuple(actions.shape)}, {(rows,)} and {(rows,)}'
            )
        if action_is_pad is not None and action_is_pad.shape != (batch, horizon):
            raise ValueError(f'action_is_pad is {tuple(action_is_pad.shape)}; it must be {(batch, horizon)}')
        if self.config.objective == 'regression':
            noise, time = self._fixed_start(noise), torch.ones_like(time)
        clean = None if delay is None else torch.arange(horizon, device=actions.device) < delay[:, None]
        if clean is not None and self.config.time_conditioning == 'token':
            raise ValueError("delay needs a time per action; use time_conditioning 'concat_mlp' or 'adarms'")
        per_action = time.float() if clean is None else time.float()[:, None].masked_fill(clean, 0.0)
        x, target = interpolate(actions, noise.float(), per_action)
        condition = self.prepare(prefix_embs, state, attention_mask, position_ids, prefix_past_key_values, batch)
        velocity = self.velocity(x, self._features_of_rows(time, clean), condition)
        error = (velocity - target).square()
        if self.config.use_time_weight:
            error = error * ((1.0 - time) / (1.0 - self.mean_time))[:, None, None]
        kept = self._kept(action_is_pad, clean, repeats)
        return FlowLoss(velocity, target, time, kept, error if kept is None else error * kept)

    def _fixed_start(self, noise: Tensor) -> Tensor:
        """What regression starts from in place of ``noise [B, T, A]``: one draw, the same for every chunk. From zeros all actions
        would be one and the same token, and learning hardly begins."""
        drawn = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(0))
        return drawn.to(noise).expand_as(noise)

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
        solver: str | None = None,
        action_prefix: Tensor | None = None,
        guidance: RealTimeGuidance | None = None,
    ) -> Tensor:
        """Draw one chunk ``[B, T, A]`` (float32, normalised) per prefix.

        Arguments as in `compute_loss`, and:

        Args:
            num_steps, solver: integration; None is the configuration's. Without a cache the prefix pass is made here, once.
            action_prefix: ``[B, d, A]``, normalised: the first d actions are these, and the others are drawn to continue them
                (trained real-time chunking). d is at most ``rtc_max_delay``.
            guidance: steer towards the previous chunk (guided real-time chunking); costs a backward pass per evaluation.

        Raises:
            ValueError: as in `compute_loss`; an action prefix that this expert was not trained for.
        """
        steps = self.config.num_inference_steps if num_steps is None else num_steps
        solver = self.config.solver if solver is None else solver
        regression = self.config.objective == 'regression'
        if regression:
            steps, solver = 1, 'euler'
        times = evaluation_times(solver, steps)
        like = prefix_embs if prefix_embs is not None else getattr(prefix_past_key_values, 'key', None)
        if like is None:
            raise ValueError('give prefix_embs or prefix_past_key_values')
        batch, shape = len(like), (self.config.action_horizon, self.config.action_dim)
        if noise is None:
            noise = torch.randn((batch, *shape), device=like.device, generator=generator)
        noise = self._fixed_start(noise.to(like.device)) if regression else noise.to(like.device)
        if regression and not (action_prefix is None and guidance is None):
            raise ValueError("a regression expert continues no known actions; use chunking 'replace' or 'ensemble'")
        self._check(noise, state)
        self._check_known_actions(batch, action_prefix, guidance)
        condition = self.prepare(prefix_embs, state, attention_mask, position_ids, prefix_past_key_values, len(noise))
        return self.denoise(noise.float(), times, steps, solver, condition, action_prefix, guidance)

    def denoise(
        self,
        noise: Tensor,
        times: list[float],
        steps: int,
        solver: str,
        condition: Conditioning,
        action_prefix: Tensor | None = None,
        guidance: RealTimeGuidance | None = None,
    ) -> Tensor:
        """The sampling loop alone. It never waits for the device and computes nothing twice: it can be captured as a graph."""
        known = 0 if action_prefix is None else action_prefix.shape[1]
        # One more time, 0, stands for the actions that are known already.
        table = self.time_features(torch.tensor([*times, 0.0][: len(times) + (known > 0)], device=noise.device))
        tokens = torch.arange(self.config.action_horizon, device=noise.device) < known if known else None

        def velocity(x: Tensor, index: int) -> Tensor:
            rows = slice(index, index + 1) if tokens is None else self._token_rows(torch.where(tokens, len(times), index)[None])
            return self.velocity(x, table.at(rows), condition)

        def pin(x: Tensor) -> Tensor:
            return x if action_prefix is None else torch.cat((action_prefix.to(x.dtype), x[:, known:]), dim=1)

        field: Callable[[Tensor, int], Tensor] = velocity if guidance is None else guided(velocity, times, guidance)
        return integrate(field, noise, steps, solver, pin)

    @property
    def mean_time(self) -> float:
        """E[t] of the configured distribution."""
        config = self.config
        if config.time_sampling == 'uniform':
            return 0.5
        return config.time_scale * config.time_alpha / (config.time_alpha + config.time_beta) + config.time_offset

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

    def sample_delay(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor | None:
        """``[count]`` lengths of a clean action prefix, uniform on 0 .. ``rtc_max_delay``; None where that is 0."""
        if not self.config.rtc_max_delay:
            return None
        return torch.randint(self.config.rtc_max_delay + 1, (count,), device=device, generator=generator)

    def prepare(
        self,
        prefix_embs: Tensor | None,
        state: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: PrefixCache | None,
        batch: int,
    ) -> Conditioning:
        """Everything that one chunk needs once: cache, suffix mask, rotary tables, state token."""
        if attention_mask is None or position_ids is None:
            raise ValueError('give the joint attention_mask and position_ids of prefix and suffix')
        if cache is None:
            if prefix_embs is None:
                raise ValueError('give prefix_embs or prefix_past_key_values')
            cache = self.backbone.prefix_pass(prefix_embs, attention_mask, position_ids, cache_only=True).cache
        if cache.batch != batch:
            raise ValueError(f'the prefix has batch {cache.batch}, the actions have batch {batch}')
        length = self.layout.length
        allowed = simplified_mask(boolean_mask(attention_mask)[:, :, -length:])
        rotary = self.backbone.rotary(cache.key, position_ids[:, -length:])
        token = None
        if self.state_proj is not None and state is not None:
            token = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None]
        return Conditioning(cache, allowed, rotary, token)

    def time_features(self, time: Tensor) -> TimeFeatures:
        """What the suffix needs of the times ``[n]``."""
        config = self.config
        embedded = time_embedding(time, config.hidden_size, config.time_min_period, config.time_max_period)
        embedded = embedded.to(self.time_mlp_in.weight.dtype)
        if config.time_conditioning == 'concat_mlp':
            weight = self.time_mlp_in.weight[:, config.hidden_size :]
            return TimeFeatures(F.linear(embedded, weight, self.time_mlp_in.bias), None)
        token = self.time_mlp_out(F.silu(self.time_mlp_in(embedded)))
        if config.time_conditioning == 'token':
            return TimeFeatures(token, None)
        return TimeFeatures(None, self.backbone.modulation(F.silu(token)))

    def velocity(self, x: Tensor, time: TimeFeatures, condition: Conditioning) -> Tensor:
        """v ``[B * R, T, A]``, float32, at ``x`` ``[B * R, T, A]`` for times that broadcast over its rows."""
        suffix = self.suffix(x, time, condition.state_token)
        hidden = self.backbone.suffix_pass(suffix, condition.cache, condition.allowed, condition.rotary, time.modulation)
        read_out = hidden[:, self.layout.actions]
        return self.action_out_proj(read_out.to(self.action_out_proj.weight.dtype)).float()

    def suffix(self, x: Tensor, time: TimeFeatures, state_token: Tensor | None) -> Tensor:
        """Suffix embeddings ``[B * R, Ls, E]`` in the order of `layout`."""
        tokens = self.action_in_proj(x.to(self.action_in_proj.weight.dtype))
        parts = [tokens]
        if self.config.time_conditioning == 'concat_mlp':
            assert time.mixed is not None
            # The mixing layer is linear in [action; time]; the time's share comes ready made.
            share = time.mixed[:, -tokens.shape[1] :] if time.mixed.dim() == 3 else time.mixed[:, None]
            mixed = F.linear(tokens, self.time_mlp_in.weight[:, : tokens.shape[-1]]) + share
            parts = [self.time_mlp_out(F.silu(mixed))]
        elif self.config.time_conditioning == 'token':
            assert time.mixed is not None
            parts.append(time.mixed[:, None].expand(len(x), -1, -1).to(tokens.dtype))
        if state_token is not None:
            repeats = len(x) // len(state_token)
            parts.insert(0, state_token.repeat_interleave(repeats, dim=0) if repeats > 1 else state_token)
        return torch.cat(parts, dim=1)

    def _features_of_rows(self, time: Tensor, clean: Tensor | None) -> TimeFeatures:
        """Features of one time per row ``[n]``, or per token where ``clean`` bool ``[n, T]`` marks actions whose time is 0."""
        if clean is None:
            return self.time_features(time)
        rows = torch.arange(len(time), device=time.device)[:, None]
        table = self.time_features(torch.cat((time, time.new_zeros(1))))
        return table.at(self._token_rows(torch.where(clean, len(time), rows)))

    def _token_rows(self, actions: Tensor) -> Tensor:
        """Row of a time table per suffix token, for the row per action ``[n, T]``: a state token has the last action's time."""
        return torch.cat((actions[:, -1:], actions), dim=1) if self.layout.has_state else actions

    @staticmethod
    def _kept(action_is_pad: Tensor | None, clean: Tensor | None, repeats: int) -> Tensor | None:
        """bool ``[n, T, 1]``: actions that count in the loss; None where all do."""
        left_out = None if action_is_pad is None else action_is_pad.bool().repeat_interleave(repeats, dim=0)
        if clean is not None:
            left_out = clean if left_out is None else clean | left_out
        return None if left_out is None else ~left_out[:, :, None]

    def _check(self, actions: Tensor, state: Tensor | None) -> None:
        expected = (self.config.action_horizon, self.config.action_dim)
        if actions.dim() != 3 or tuple(actions.shape[1:]) != expected:
            raise ValueError(f'actions are {tuple(actions.shape)}; expected [batch, {expected[0]}, {expected[1]}]')
        if self.use_state:
            if state is None:
                raise ValueError(f'this model has a state token; give state [batch, {self.config.state_dim}]')
            if state.dim() != 2 or state.shape[1] != self.config.state_dim:
                raise ValueError(f'state is {tuple(state.shape)}; expected [batch, {self.config.state_dim}]')
            if len(state) != len(actions):
                raise ValueError(f'state has batch {len(state)}, the actions have batch {len(actions)}')
        for name, value in (('actions', actions), ('state', state if self.use_state else None)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f'{name} contain NaN or infinite values')

    def _check_known_actions(self, batch: int, prefix: Tensor | None, guidance: RealTimeGuidance | None) -> None:
        horizon, width, longest = self.config.action_horizon, self.config.action_dim, self.config.rtc_max_delay
        if guidance is not None and tuple(guidance.previous.shape) != (batch, horizon, width):
            raise ValueError(f'guidance.previous is {tuple(guidance.previous.shape)}; expected {(batch, horizon, width)}')
        if guidance is not None and not bool(torch.isfinite(guidance.previous[:, : guidance.execution_horizon]).all()):
            raise ValueError('guidance.previous has NaN or infinite values inside the overlap')
        if prefix is None:
            return
        if prefix.dim() != 3 or prefix.shape[0] != batch or prefix.shape[2] != width:
            raise ValueError(f'action_prefix is {tuple(prefix.shape)}; expected [{batch}, steps, {width}]')
        if prefix.shape[1] > longest:
            raise ValueError(
                f'action_prefix has {prefix.shape[1]} steps; this expert was trained for at most {longest} '
                '(expert_config.rtc_max_delay): execute fewer steps per chunk, or use guidance'
            )
        if not bool(torch.isfinite(prefix).all()):
            raise ValueError('action_prefix has NaN or infinite values')
