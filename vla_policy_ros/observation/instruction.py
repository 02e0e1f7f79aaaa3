"""The operator's sentence: what is accepted as an instruction."""

from __future__ import annotations

import unicodedata


class InstructionError(ValueError):
    """An instruction that is refused; the message says why."""


def clean_instruction(text: str, max_length: int) -> str:
    """The instruction as the model gets it: NFC-normalised Unicode with white space folded.

    Any language is accepted. An empty result means that there is nothing to do.

    Raises:
        InstructionError: longer than ``max_length`` characters, or with control characters.
    """
    text = ' '.join(unicodedata.normalize('NFC', text).split())
    if len(text) > max_length:
        raise InstructionError(f'instruction has {len(text)} characters; the robot file allows {max_length}')
    control = [c for c in text if unicodedata.category(c) in ('Cc', 'Cs', 'Cn', 'Co')]
    if control:
        raise InstructionError(f'instruction contains the character U+{ord(control[0]):04X}, which is not text')
    return text
