"""What is written is understood, and what is not clear is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from vla_policy_ros.sim.instructions import instruction_for, parse_instruction
from vla_policy_ros.sim.scene import ObjectSpec, sample_scene


def test_every_generated_sentence_names_its_object():
    rng = np.random.default_rng(0)
    sentences = set()
    for seed in range(150):
        objects = sample_scene(seed).objects
        for spec in objects:
            sentence = instruction_for(spec, objects, rng)
            sentences.add(sentence)
            assert parse_instruction(sentence, objects).object == spec, sentence
    assert len(sentences) > 80
    assert any('object' in s for s in sentences) and any(s.endswith('the ball') for s in sentences)


def test_generation_is_seeded():
    objects = sample_scene(0).objects
    first, again = (
        [instruction_for(o, objects, rng) for o in objects for _ in range(5)] for rng in map(np.random.default_rng, (7, 7))
    )
    assert first == again


SCENE = tuple(
    ObjectSpec(colour, shape, 0.5, 0.0, 0.0, 1.0) for colour, shape in (('red', 'cube'), ('red', 'ball'), ('blue', 'cube'))
)


@pytest.mark.parametrize(
    ('sentence', 'name'),
    [
        ('Reach the RED cube!', 'red cube'),
        ('touch the sphere', 'red ball'),
        ('the blue thing, please', 'blue cube'),
        ('go to the red block', 'red cube'),
        ('can you reach the blue cube', 'blue cube'),
    ],
)
def test_words_find_their_object(sentence, name):
    assert parse_instruction(sentence, SCENE).object.name == name


@pytest.mark.parametrize(
    ('sentence', 'reason'),
    [
        ('reach the red object', 'ambiguous: red fits red cube and red ball'),
        ('reach the cube', 'ambiguous: cube fits red cube and blue cube'),
        ('reach the green cube', 'names a green cube, but the scene has'),
        ('reach the red cube and the blue cube', 'ambiguous: it names blue and red'),
        ('open the drawer', 'names no colour'),
        ('', 'names no colour'),
        ('はやく', 'names no colour'),
    ],
)
def test_unclear_sentences_name_nothing_and_say_why(sentence, reason):
    target = parse_instruction(sentence, SCENE)
    assert target.object is None and reason in target.reason
