"""The language path: words with images in them, with and without a cache, causal and equal to transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy import FULL, LEFT, RIGHT, STATE_DIM, TOKENS_PER_VIEW, VOCAB, noise, policy_inputs, toy_model

from vla_policy_ros.model.attention import position_ids_from_pad
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

Model = MapAnythingLlava3DForConditionalGeneration
NEW = 12
PADDING = {'full': FULL, 'right': RIGHT, 'left': LEFT}
every_padding = pytest.mark.parametrize('side', PADDING)


@pytest.fixture(scope='module')
def model() -> Model:
    speaker = toy_model()
    speaker.language_model.generation_config.eos_token_id = None
    return speaker


def prompt(side: str = 'full', masked_camera: bool = False) -> dict[str, Tensor]:
    """A prompt of two cameras; the second sample's words are shorter by three, filled up on a side."""
    inputs = policy_inputs()
    del inputs['state']
    ids, mask = inputs['input_ids'], torch.ones_like(inputs['input_ids'])
    if side == 'right':
        mask[1, -3:] = 0
    elif side == 'left':
        ids[1] = torch.cat((ids[1, -3:], ids[1, :-3]))
        mask[1, :3] = 0
    inputs |= {'attention_mask': mask}
    if masked_camera:
        inputs |= {'image_masks': torch.tensor([[True, False], [True, True]])}
    return inputs


def last_logits(model: Model, inputs: dict[str, Tensor], valid: Tensor) -> Tensor:
    """Logits behind the last valid token of each sample, from one forward pass over everything."""
    last = (valid * torch.arange(valid.shape[1])).argmax(dim=1)
    return model(**inputs).logits[torch.arange(len(valid)), last]


@torch.no_grad()
def greedy_without_cache(model: Model, inputs: dict[str, Tensor], count: int) -> Tensor:
    """The definition: every word from a fresh pass over the whole sequence so far."""
    inputs, words = dict(inputs), []
    for _ in range(count):
        words.append(last_logits(model, inputs, inputs['attention_mask']).argmax(dim=-1))
        inputs['input_ids'] = torch.cat((inputs['input_ids'], words[-1][:, None]), dim=1)
        inputs['attention_mask'] = torch.cat((inputs['attention_mask'], torch.ones(2, 1, dtype=torch.long)), dim=1)
    return torch.stack(words, dim=1)


@every_padding
@pytest.mark.parametrize('masked_camera', [False, True])
def test_greedy_words_with_a_cache_equal_those_without(model: Model, side: str, masked_camera: bool) -> None:
    """O35: exactly."""
    inputs = prompt(side, masked_camera)
    expected = greedy_without_cache(model, inputs, NEW)
    got = model.generate(inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, expected)
    assert len(set(got.flatten().tolist())) > 3, 'not one word over and over'


@pytest.mark.parametrize(
    'family', [{'text_config': {'model_type': 'mistral', 'sliding_window': None}}, {'use_action_expert': False}]
)
def test_every_speaker_generates(family: dict[str, Any]) -> None:
    """O35 for a Mistral backbone, and for a model without an action expert."""
    speaker = toy_model(**family)
    speaker.language_model.generation_config.eos_token_id = None
    inputs = prompt('right')
    assert torch.equal(speaker.generate(inputs, max_new_tokens=5, do_sample=False), greedy_without_cache(speaker, inputs, 5))


def test_generation_ends_at_the_end_word(model: Model) -> None:
    inputs = prompt()
    words = greedy_without_cache(model, inputs, NEW)
    end = int(words[0, 3])
    first = words[0].tolist().index(end) + 1
    got = model.generate(inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert got[0, :first].tolist() == words[0, :first].tolist()
    assert (got[0, first:] == 0).all()


@torch.no_grad()
def test_images_change_the_first_word(model: Model) -> None:
    """O35: they are there at step 0, and in every later step."""
    inputs = prompt()
    other = {**inputs, 'pixel_values': 255 - inputs['pixel_values']}
    first, changed = (last_logits(model, given, given['attention_mask']) for given in (inputs, other))
    assert (first - changed).abs().max() > 0.1 * first.std()
    words = [model.generate(given, max_new_tokens=NEW, do_sample=False) for given in (inputs, other)]
    assert not torch.equal(*words)
    hidden = prompt(masked_camera=True)
    scrambled = {**hidden, 'pixel_values': hidden['pixel_values'].clone()}
    scrambled['pixel_values'][0, 1] = 255 - scrambled['pixel_values'][0, 1]
    assert torch.equal(*(model.generate(given, max_new_tokens=NEW, do_sample=False) for given in (hidden, scrambled)))


@every_padding
@torch.no_grad()
def test_word_by_word_with_past_key_values_equals_one_pass(model: Model, side: str) -> None:
    inputs = prompt(side)
    words = torch.randint(3, VOCAB, (2, 4), generator=torch.Generator().manual_seed(7))
    mask = torch.cat((inputs['attention_mask'], torch.ones(2, 4, dtype=torch.long)), dim=1)
    together = model(**{**inputs, 'input_ids': torch.cat((inputs['input_ids'], words), dim=1), 'attention_mask': mask}).logits
    step = model(**inputs, use_cache=True)
    assert step.past_key_values is not None
    for index in range(4):
        length = inputs['input_ids'].shape[1] + index
        given = {'past_key_values': step.past_key_values, 'attention_mask': mask[:, : length + 1], 'use_cache': True}
        step = model(words[:, index : index + 1], **given)
        assert step.past_key_values.get_seq_length() == length + 1
        assert ((step.logits[:, 0] - together[:, length]) / together.std()).abs().max() < 2e-5
    with pytest.raises(ValueError, match='past_key_values hold 17 tokens; give the attention_mask'):
        model(words[:, :1], past_key_values=step.past_key_values)


@every_padding
@pytest.mark.parametrize('masked_camera', [False, True])
@torch.no_grad()
def test_language_path_and_causal_prefix_pass_are_the_same_network(side: str, masked_camera: bool) -> None:
    """O35 and O4: hidden states and logits of the prefix pass, of the language path, and of transformers alone."""
    model = toy_model(prefix_attention='causal')
    inputs = prompt(side, masked_camera)
    prefix = model.embed_prefix(**inputs)
    spoken = model(**inputs, output_hidden_states=True)
    done = model.language_model_with_expert.prefix_pass(prefix.embeds, prefix.pad)
    alone = model.language_model(
        inputs_embeds=prefix.embeds, attention_mask=prefix.pad.long(), position_ids=position_ids_from_pad(prefix.pad)
    )
    assert torch.equal(spoken.logits, alone.logits)
    logits, scale = model.language_model.lm_head(done.output), spoken.logits[prefix.pad].std()
    assert ((logits - spoken.logits)[prefix.pad] / scale).abs().max() < 1e-5
    for ours, theirs in zip(done.hidden_states, spoken.hidden_states, strict=True):
        spread = theirs[prefix.pad].std()
        assert ((ours - theirs)[prefix.pad] / spread).abs().max() < 1e-5
    cut = {**inputs, 'input_ids': inputs['input_ids'][:, :-1], 'attention_mask': inputs['attention_mask'][:, :-1]}
    shorter = model(**cut).logits
    valid = prefix.pad[:, :-1]
    assert ((shorter - spoken.logits[:, :-1])[valid] / scale).abs().max() < 1e-5, 'causal: later words do not matter'


@torch.no_grad()
def test_labels_give_the_shifted_cross_entropy(model: Model) -> None:
    inputs = prompt('right')
    labels = inputs['input_ids'].masked_fill((inputs['input_ids'] < 0) | (inputs['attention_mask'] == 0), -100)
    output = model(**inputs, labels=labels)
    counted = labels[:, 1:] != -100
    chosen = torch.log_softmax(output.logits[:, :-1], dim=-1)[counted].gather(1, labels[:, 1:][counted][:, None])
    torch.testing.assert_close(output.loss, -chosen.mean(), atol=1e-5, rtol=1e-5)
    assert output.image_hidden_states.shape == (2, 2 * TOKENS_PER_VIEW, 64)


def test_what_generation_cannot_do_is_refused(model: Model) -> None:
    inputs = prompt()
    with pytest.raises(ValueError, match='always uses a cache'):
        model.generate(inputs, max_new_tokens=2, use_cache=False)
    with pytest.raises(ValueError, match='8 image positions'):
        model.generate({'input_ids': inputs['input_ids']}, max_new_tokens=2)
    with pytest.raises(ValueError, match='input_ids or inputs_embeds'):
        model()
    with pytest.raises(ValueError, match='inputs_embeds alone cannot take pixel_values'):
        model(inputs_embeds=torch.zeros(2, 3, 64), pixel_values=inputs['pixel_values'])


def test_state_is_no_part_of_a_prompt_and_actions_still_work(model: Model) -> None:
    """The same inputs serve both uses, and generation leaves nothing behind in the action path."""
    inputs = {**prompt(), 'state': torch.zeros(2, STATE_DIM)}
    before = model.predict_action(inputs, 2, noise=noise())
    words = model.generate(inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(words, model.generate(prompt(), max_new_tokens=3, do_sample=False))
    assert torch.equal(model.predict_action(inputs, 2, noise=noise()), before)


@torch.no_grad()
def test_given_embeddings_take_the_place_of_ids(model: Model) -> None:
    inputs = prompt('left')
    prefix = model.embed_prefix(**inputs)
    expected = model(**inputs).logits
    assert torch.equal(model(inputs_embeds=prefix.embeds, attention_mask=inputs['attention_mask']).logits, expected)
