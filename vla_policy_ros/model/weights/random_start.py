"""Random initial tensors of a network that lies on the meta device, made a piece at a time."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Elements of the largest piece that is made in one go (a gigabyte in float32), unless a single layer is larger.
PIECE = 2**28


@dataclass(frozen=True)
class _Piece:
    """A module that is initialised as a whole, or, where ``alone``, only its own parameters without its children's."""

    prefix: str
    module: nn.Module
    owner: PreTrainedModel
    alone: bool


class RandomStart:
    """Gives the tensors that a fresh model would have, by name; each depends on ``seed`` and on the place of its module only.

    Args:
        model: the network, on the meta device.
        seed: of all draws.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._seed = seed
        self._piece_of: dict[str, _Piece] = {}
        for piece in _pieces(model, '', model):
            own = piece.module.state_dict()
            for name in own:
                if not piece.alone or '.' not in name:
                    self._piece_of[f'{piece.prefix}{name}'] = piece
        self._made: tuple[str, dict[str, Tensor]] = ('', {})

    def get(self, name: str) -> Tensor:
        """The initial value of a tensor of the model's state dict, float32 on the CPU."""
        piece = self._piece_of[name]
        key = f'{piece.prefix}{"." if piece.alone else ""}'
        if self._made[0] != key or not self._made[1]:
            self._made = ('', {})  # let the last piece go before the next one is made
            self._made = (key, self._make(piece))
        return self._made[1][name]

    @torch.no_grad()
    def _make(self, piece: _Piece) -> dict[str, Tensor]:
        module = _without_children(piece.module) if piece.alone else copy.deepcopy(piece.module)
        module.to_empty(device='cpu')
        digest = hashlib.sha256(f'{self._seed}/{piece.prefix}/{piece.alone}'.encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], 'big') >> 1)
            _initialise(module, piece.owner)
        return {f'{piece.prefix}{name}': value for name, value in module.state_dict().items()}


def _pieces(module: nn.Module, prefix: str, owner: PreTrainedModel, in_list: bool = False) -> Iterator[_Piece]:
    """Whole layers and whole small modules: the rules of a layer may reach into its children, so that it is not cut."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    children = list(module.named_children())
    if not children or in_list or (prefix and sum(value.numel() for value in module.state_dict().values()) <= PIECE):
        yield _Piece(prefix, module, owner, alone=False)
        return
    if any('.' not in name for name in module.state_dict()):
        yield _Piece(prefix, module, owner, alone=True)
    for name, child in children:
        yield from _pieces(child, f'{prefix}{name}.', owner, isinstance(module, nn.ModuleList))


def _without_children(module: nn.Module) -> nn.Module:
    """A copy that keeps the parameters and buffers of ``module`` itself."""
    shell = copy.copy(module)
    shell._modules = {}
    shell._parameters = dict(module._parameters)
    shell._buffers = dict(module._buffers)
    return shell


def _initialise(module: nn.Module, owner: PreTrainedModel) -> None:
    """As transformers does it: children first, each by the rules of the model that it belongs to."""
    for child in module.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else owner)
    owner._init_weights(module)
