"""One process or many: what `torchrun` started, through Accelerate.

Without sharding every process holds a copy of everything (DDP). With it, torch's fully_shard splits weights, gradients and
optimiser state over the processes, and each layer gathers its weights when it runs. Sharding is done here and not by Accelerate,
for two reasons: Accelerate refuses it on CPUs, where the tests run it; and the language layers do not run through their own
``forward``, so that each needs a method of its own to gather around (`deep_fusion.CALL_BACK`).

Enters: an objective. Leaves: the same objective, wrapped. The thread that trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vla_policy_ros.model.deep_fusion import CALL_BACK
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.training.config import TrainingConfig
from vla_policy_ros.training.objective import Objective
from vla_policy_ros.training.parameters import DTYPES

_TOWER_LAYERS = ('SiglipEncoderLayer', 'CLIPEncoderLayer', 'Block')


class Parallel:
    """The processes of a run.

    Args:
        config: gives precision and sharding.

    Attributes:
        rank, world: this process, and how many there are.
        main: whether this process writes logs and checkpoints.
    """

    def __init__(self, config: TrainingConfig) -> None:
        # The precision is set here, per run: Accelerate's is one for the life of a process.
        self.accelerator = Accelerator(mixed_precision='no', cpu=not torch.cuda.is_available())
        self._sharded = config.sharding == 'fsdp' and self.accelerator.num_processes > 1
        self._bfloat16 = config.precision == 'bfloat16'
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self._objective: Any = None
        self._wrapped: Any = None

    def wrap(self, objective: Objective) -> None:
        """Place the objective on its devices. Its parameters may be other objects afterwards."""
        self._objective = objective
        if self.world == 1:
            objective.to(self.device)
            self._wrapped = objective
        elif self._sharded:
            self._wrapped = self._shard(objective)
        else:
            # With insulation, which prefix weights have gradients depends on the auxiliary losses; where nothing acts, only the
            # towers have any.
            unused = objective.model.config.expert_config.knowledge_insulation or not objective.acts
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
            self._wrapped = self.accelerator.prepare_model(objective)

    def _shard(self, objective: Objective) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (self.world,))
        # Weights are gathered in the precision of the run. Inputs keep theirs: times and actions are compared in float32.
        gathered = DTYPES['bfloat16'] if self._bfloat16 else None
        options: dict[str, Any] = {
            'mesh': mesh,
            'mp_policy': MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False),
        }
        for head in objective.heads.values():
            fully_shard(head, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for layer in layers_in_turn(objective.model):
            setattr(layer, CALL_BACK, MethodType(_call_back, layer))
            fully_shard(layer, **options)
            register_fsdp_forward_method(layer, CALL_BACK)
        # Keys and values leave a layer as views; nobody writes into them, which is what the warning is about.
        warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view tensor')
        fully_shard(objective, **options)
        register_fsdp_forward_method(objective, 'sample')
        return objective

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The objective's forward pass, in the precision of the run.

        In bfloat16, copies keep float32 weights and cast each matrix product; shards are gathered in bfloat16.
        """
        with self._precision():
            return self._wrapped(self._on_device(batch))

    def sample(self, batch: dict[str, Tensor]) -> Tensor:
        """Chunks of the objective's network, ``[B, T, A]``, in the precision of the run; on the CPU."""
        with self._precision():
            return self._objective.sample(self._on_device(batch)).cpu()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=DTYPES['bfloat16'], enabled=self._bfloat16 and not self._sharded)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """One micro-batch; copies exchange gradients in the last one only, shards in every one, which keeps them small."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            yield
            return
        with self._wrapped.no_sync():
            yield

    def release(self) -> None:
        """Drop gathered weights: after a forward pass without a backward pass the outermost ones would stay, outdated."""
        for module in [] if self._wrapped is None else self._wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, which other processes average with theirs."""
        self.accelerator.backward(loss)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        """Scale all gradients down where their norm exceeds ``largest``; the norm before, of the whole gradient."""
        norm: Tensor = self.accelerator.clip_grad_norm_(list(parameters), largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, on the CPU."""
        return self.accelerator.reduce(value.to(self.device), 'sum').cpu()

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes."""
        self.accelerator.end_training()

    def in_turn_after_main(self, make: Callable[[], Any]) -> Any:
        """``make()`` first in the main process, then in the others: what writes files that the others then find."""
        with self.accelerator.main_process_first():
            return make()


def layers_in_turn(model: MapAnythingLlava3DForConditionalGeneration) -> list[nn.Module]:
    """The layers that a sharded run gathers one after the other; all other weights stay gathered during a pass."""
    towers = [module for module in model.modules() if type(module).__name__ in _TOWER_LAYERS]
    backbone = model.language_model_with_expert
    return [*towers, *([] if backbone is None else backbone.stream_layers())]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, which must all call this; on the CPU."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _call_back(layer: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(layer, *arguments)
