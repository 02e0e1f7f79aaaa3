"""The checks of this folder notice the mistakes that such systems have been known to ship with.

Each mutation breaks the real code; every check that is named beside it must then fail, and pass without it.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import test_deep_fusion
import test_flow_matching
import test_modeling
import test_real_time_chunking
import test_solvers
import test_streams
import test_vision
import torch
from torch import Tensor
from toy import LEFT, RIGHT, toy_model

from vla_policy_ros.model import deep_fusion, flow_matching, real_time_chunking, solvers, vision
from vla_policy_ros.model.deep_fusion import LLaVA3DWithActionExpertModel
from vla_policy_ros.model.flow_matching import FlowMatchingActionExpert, SuffixLayout
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

Mutation = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]


def rewritten(function: FunctionType, right: str, wrong: str) -> Mutation:
    """The mutation that replaces the one place of ``right`` in a function's source; all who hold the function get it."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(right) == 1, f'{function.__qualname__} has no single {right!r} any more; bring the table up to date'
        names: dict[str, Any] = {}
        text = 'from __future__ import annotations\n' + source.replace(right, wrong)
        exec(compile(text, function.__code__.co_filename, 'exec'), function.__globals__, names)
        patch.setattr(function, '__code__', names[function.__name__].__code__)

    return mutate


def growing_cache(patch: pytest.MonkeyPatch) -> None:
    """Keys and values of earlier suffix passes stay behind the prefix, where later passes see them."""
    real, earlier = deep_fusion.attend, {}

    def attend(query: Tensor, segments: list[Any], allowed: Tensor | None, implementation: str) -> Tensor:
        if len(segments) == 1:
            return real(query, segments, allowed, implementation)
        past, own = segments
        key, seen = past.key, earlier.setdefault(id(past.key), [])
        kept = [part for _, part in seen]
        if allowed is not None and kept:
            extra = allowed.new_ones(*allowed.shape[:3], sum(part.key.shape[2] for part in kept))
            allowed = torch.cat((allowed[..., : key.shape[2]], extra, allowed[..., key.shape[2] :]), dim=-1)
        seen.append((key, own))
        return real(query, [past, *kept, own], allowed, implementation)

    patch.setattr(deep_fusion, 'attend', attend)


def reaches_into_the_prefix(patch: pytest.MonkeyPatch) -> None:
    """A suffix pass writes one slot too early into a preallocated cache."""
    real = deep_fusion._write
    patch.setattr(deep_fusion, '_write', lambda buffer, new, start: real(buffer, new, max(0, start - 1)))


def positions_count_padding(patch: pytest.MonkeyPatch) -> None:
    """Positions run on through padding."""
    for module in ('vla_policy_ros.model.modeling', 'vla_policy_ros.model.deep_fusion'):
        patch.setattr(f'{module}.position_ids_from_pad', lambda pad: torch.arange(pad.shape[1]).expand(pad.shape))


def with_toy(check: Callable[..., None], **arguments: Any) -> Check:
    """A check whose model is a fixture elsewhere."""
    return lambda: check(toy_model(), **arguments)


def with_patch(check: Callable[..., None]) -> Check:
    """A check that patches something itself."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as inner:
            check(inner)

    return run


Network = MapAnythingLlava3DForConditionalGeneration
ORACLES: dict[str, Check] = {
    'O1': partial(test_deep_fusion.test_cached_suffix_equals_one_joint_pass_over_both_streams, 'separate', RIGHT),
    'O1 left': partial(test_deep_fusion.test_cached_suffix_equals_one_joint_pass_over_both_streams, 'separate', LEFT),
    'O2': partial(test_flow_matching.test_sampling_with_and_without_a_cache_equals_the_formula, RIGHT, 'token', 'euler'),
    'O2 preallocated': partial(test_streams.test_both_cache_forms_give_one_chunk, 'token', 'sdpa', RIGHT),
    'O3': partial(test_deep_fusion.test_cache_is_only_read, RIGHT),
    'O5': partial(test_deep_fusion.test_bidirectional_prefix_pass_equals_transformers_llama_under_the_same_mask, RIGHT),
    'O9': test_deep_fusion.test_left_and_right_padding_and_no_padding_agree,
    'O11': partial(test_deep_fusion.test_order_of_a_bidirectional_prefix_is_only_in_its_positions, RIGHT),
    'O16': partial(test_solvers.test_constant_field_moves_by_the_constant, 10, 'euler'),
    'O17': partial(test_solvers.test_field_of_one_point_ends_in_that_point_for_any_number_of_steps, 10, 'euler'),
    'O18': partial(test_solvers.test_linear_field_converges_with_the_order_of_the_solver, 'euler'),
    'O19': partial(test_solvers.test_gaussian_field_converges_to_the_exact_map, 'euler'),
    'O21': with_patch(test_flow_matching.test_loss_is_zero_for_the_true_velocity_and_the_target_energy_for_none),
    'O22': test_flow_matching.test_interpolation_ends_in_actions_and_noise,
    'O25': partial(test_flow_matching.test_each_action_is_read_from_its_own_row, 'token', True),
    'O27': with_toy(test_modeling.test_image_features_fill_their_slots_in_order_and_words_stay),
    'O28': partial(test_modeling.test_an_absent_camera_changes_nothing_and_equals_having_fewer, 1),
    'O30': partial(test_vision.test_each_tower_gets_pixels_normalised_once_with_its_own_statistics, {}, test_vision.SIGLIP_RANGE),
    'O37 jacobian': partial(test_real_time_chunking.test_correction_is_the_product_with_the_jacobian_of_the_network, 0.3, 'token'),
    'O37 trained': partial(test_real_time_chunking.test_known_actions_come_back_bit_for_bit, 3, 'euler', 'adarms'),
}

MUTATIONS: dict[str, tuple[Mutation, list[str]]] = {
    'integration with the opposite sign': (
        rewritten(solvers.integrate, 'pinned(x - step * slope)', 'pinned(x + step * slope)'),
        ['O16', 'O17', 'O18', 'O19'],
    ),
    'target with the opposite sign': (
        rewritten(flow_matching.interpolate, 'noise - actions', 'actions - noise'),
        ['O21', 'O22'],
    ),
    'causal cache under a bidirectional mask': (
        rewritten(LLaVA3DWithActionExpertModel.prefix_pass, 'mask[:, :, :length, :length]', 'mask[:, :, :length, :length].tril()'),
        ['O1', 'O1 left', 'O11'],
    ),
    'causal cache in sampling only': (
        rewritten(
            LLaVA3DWithActionExpertModel.prefix_pass,
            'mask[:, :, :length, :length]',
            'mask[:, :, :length, :length].tril() if cache_only else mask[:, :, :length, :length]',
        ),
        ['O2'],
    ),
    'causal prefix where the configuration says bidirectional': (
        rewritten(
            LLaVA3DWithActionExpertModel.prefix_pass,
            'prefix_block_starts(self.prefix_attention, mask, None)',
            "prefix_block_starts('causal', mask, None)",
        ),
        ['O5'],
    ),
    'cache that grows with every step': (growing_cache, ['O2', 'O3']),
    'cache overwritten at its last prefix slot': (reaches_into_the_prefix, ['O2 preallocated']),
    'ids clamped into the vocabulary before images are found': (
        rewritten(
            Network.embed_prefix,
            'is_image = input_ids == marker',
            'input_ids = input_ids.clamp(0, self.config.text_config.vocab_size - 1); is_image = input_ids == marker',
        ),
        ['O27', 'O28'],
    ),
    'actions read one row too early': (
        lambda patch: patch.setattr(SuffixLayout, 'actions', property(lambda self: slice(0, self.horizon))),
        ['O25'],
    ),
    'actions read one row too late': (
        lambda patch: patch.setattr(SuffixLayout, 'actions', property(lambda self: slice(self.length - self.horizon, self.length))),
        ['O25'],
    ),
    'positions that count padding': (positions_count_padding, ['O9', 'O28']),
    'pixels normalised twice': (
        rewritten(vision.vision_pixels, '(rgb - mean) / std', '((rgb - mean) / std - mean) / std'),
        ['O30'],
    ),
    'guidance without the network in its Jacobian': (
        rewritten(real_time_chunking.guided, 'times[index] * v\n', 'times[index] * v.detach()\n'),
        ['O37 jacobian'],
    ),
    'known actions not put back': (
        rewritten(FlowMatchingActionExpert.denoise, 'noise, steps, solver, pin)', 'noise, steps, solver)'),
        ['O37 trained'],
    ),
}  # fmt: skip


@pytest.mark.parametrize('oracle', ORACLES)
def test_every_named_check_passes_on_the_real_code(oracle: str) -> None:
    ORACLES[oracle]()


@pytest.mark.parametrize(('mutation', 'oracle'), [(name, oracle) for name, (_, oracles) in MUTATIONS.items() for oracle in oracles])
def test_a_known_mistake_does_not_pass(monkeypatch: pytest.MonkeyPatch, mutation: str, oracle: str) -> None:
    MUTATIONS[mutation][0](monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        ORACLES[oracle]()


def test_every_named_check_serves_a_mutation() -> None:
    assert {oracle for _, oracles in MUTATIONS.values() for oracle in oracles} == set(ORACLES)
