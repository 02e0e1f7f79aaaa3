"""A small byte-level tokenizer for models that are trained from nothing.

Words that operators use often become one token each; everything else falls back to bytes, so that no UTF-8 instruction ever loses
information. It is built here, deterministically, and saved with the checkpoint: no download. Large models bring their own.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = '<s>', '</s>', '<pad>'

WORDS = """
USER: ASSISTANT: A a the to of in on at it is and or with from into onto over under above below between behind beside near next by
up down left right front back top bottom side middle center corner edge forward backward clockwise here there this that these those
reach touch point go move pick grab grasp take lift hold place put drop push pull press open close turn rotate pour wipe stack sort
hand give bring stop wait return home start then after before again slowly carefully gently now please can you me
red green blue yellow orange purple pink brown black white gray grey cyan dark light
cube ball cylinder box block sphere cone ring ball bottle cup mug glass plate bowl can jar lid pot pan knife fork spoon tray basket
drawer door button handle switch table shelf floor wall towel cloth sponge book pen paper apple banana lemon carrot tool screw
robot arm gripper finger wrist camera object item thing one two three four first second third other same all both any small large
big little long short tall round flat empty full near far closest farthest
"""


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer over common manipulation words, with ``<s>``, ``</s>`` and ``<pad>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = WORDS.split()
    tokenizer.train_from_iterator((f' {word}' for word in words), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
