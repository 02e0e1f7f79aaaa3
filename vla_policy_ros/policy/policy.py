"""The policy: one observation in, one chunk of actions out.

Lives on the executor thread. A chunk depends on the observation, the weights and the seed, and on nothing that happened before:
the noise it starts from is drawn from the seed and the observation's stamp.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_policy_ros.model.real_time_chunking import RealTimeGuidance
from vla_policy_ros.model.solvers import evaluation_times
from vla_policy_ros.policy.checkpoint import Checkpoint, load_checkpoint
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import ActionChunk, CameraView, KnownActions, Observation

WARM_UP_RUNS = 2
DEFAULT_IMAGE_SIZE = (640, 480)


def use_threads(count: int) -> None:
    """How many threads torch takes for one operation in this process; for those that call a policy without its executor."""
    torch.set_num_threads(count)


class Policy:
    """A checkpoint at work for one robot.

    Attributes:
        robot: the robot file it answers for.
        checkpoint_hash: SHA-256 of weights and network configuration.
        stats_hash: SHA-256 of the normalisation statistics.
        summary: model type, sizes, parameter count, device and dtype, for status displays.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        robot: Robot,
        *,
        device: str,
        dtype: str,
        num_steps: int | None,
        solver: str | None,
        seed: int | None,
        chunking: str,
    ) -> None:
        self.robot = robot
        self._model = checkpoint.model
        self._processor = checkpoint.processor
        self._device = torch.device(device)
        expert = checkpoint.model.config.expert_config
        self._num_steps = expert.num_inference_steps if num_steps is None else num_steps
        self._solver = expert.solver if solver is None else solver
        evaluation_times(self._solver, self._num_steps)  # refuses what cannot be integrated, now rather than while moving
        if chunking == 'rtc_trained' and expert.rtc_max_delay == 0:
            raise ValueError(
                'chunking rtc_trained needs a checkpoint that was trained for it (expert_config.rtc_max_delay is 0): '
                'use rtc_guided, which works with any'
            )
        self._chunking = chunking
        self._longest_prefix = expert.rtc_max_delay
        self._noise_shape = (1, expert.action_horizon, expert.action_dim)
        self._seed = seed
        self._generator = torch.Generator()
        self._generator.seed()
        self._sequence = 0
        self.checkpoint_hash = checkpoint.content_hash
        self.stats_hash = checkpoint.processor.statistics.digest
        self.summary: dict[str, Any] = {
            'path': str(checkpoint.path),
            'model_type': checkpoint.model.config.model_type,
            'parameters': sum(parameter.numel() for parameter in checkpoint.model.parameters()),
            'cameras': list(checkpoint.signature.cameras),
            'action_dim': expert.action_dim,
            'horizon': expert.action_horizon,
            'num_steps': self._num_steps,
            'solver': self._solver,
            'device': device,
            'dtype': dtype,
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        robot: Robot,
        *,
        device: str = 'cpu',
        dtype: str = 'float32',
        num_steps: int | None = None,
        solver: str | None = None,
        seed: int | None = None,
        chunking: str = 'replace',
    ) -> Policy:
        """Open a checkpoint folder for a robot.

        Args:
            path: the folder.
            robot: the robot file; it must be what the checkpoint was trained for.
            device: torch device.
            dtype: ``float32``, ``bfloat16`` or ``float16`` compute.
            num_steps: integration steps per chunk; None is the checkpoint's own number.
            solver: ``euler``, ``ab2`` or ``midpoint``; None is the checkpoint's own.
            seed: makes chunks reproducible; None draws fresh noise.
            chunking: ``rtc_guided`` or ``rtc_trained`` make `infer` continue the actions that are known already; other modes do
                not.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged or made for another robot.
            ValueError: the solver is unknown, there is no step, or the checkpoint was not trained for ``rtc_trained``.
        """
        checkpoint = load_checkpoint(path, robot, device=device, dtype=dtype)
        return cls(checkpoint, robot, device=device, dtype=dtype, num_steps=num_steps, solver=solver, seed=seed, chunking=chunking)

    def infer(self, observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        """Answer an observation.

        Args:
            observation: what the robot sees.
            known: what is decided already about the answer (real-time chunking); None leaves it free.

        Returns:
            absolute actions ``[T, A]`` in robot units; action 0 is one period after the observation's stamp. Values are what the
            network says, unchecked: the control room rejects what is not finite or out of limits.

        Raises:
            ValueError: the observation has another camera, state size or image type than the checkpoint.
        """
        actions, stages = self._run(observation, known)
        period = self.robot.action.period_ns
        chunk = ActionChunk(
            stamp_ns=observation.stamp_ns + period,
            dt_ns=period,
            joint_names=self.robot.action.joints,
            actions=actions,
            observation_stamp_ns=observation.stamp_ns,
            instruction=observation.instruction,
            sequence=self._sequence,
            stages_ms=stages,
            checkpoint_hash=self.checkpoint_hash,
            stats_hash=self.stats_hash,
        )
        self._sequence += 1
        return chunk

    def warm_up(self) -> float:
        """Run on a synthetic observation of the right shapes until caches are filled; milliseconds of the last run."""
        views = {}
        for name, camera in self.robot.cameras.items():
            width, height = camera.width or DEFAULT_IMAGE_SIZE[0], camera.height or DEFAULT_IMAGE_SIZE[1]
            K = camera.fixed_K
            if K is None and camera.camera_info is not None:
                K = np.array([[width, 0.0, width / 2], [0.0, width, height / 2], [0.0, 0.0, 1.0]])
            views[name] = CameraView(np.full((height, width, 3), 127, dtype=np.uint8), K, 0)
        observation = Observation(0, views, np.zeros(len(self.robot.state.names)), 0, 'warm up')
        stages: Mapping[str, float] = {}
        known = None
        if self._chunking in ('rtc_guided', 'rtc_trained'):
            # The first chunk of a motion is free, the others continue it: both ways are to be warm.
            self._run(observation, None)
            horizon, actions = self._noise_shape[1:]
            known = KnownActions(np.zeros((horizon, actions)), min(1, horizon - 1), horizon - 1)
        for _ in range(WARM_UP_RUNS):
            _, stages = self._run(observation, known)
        return sum(stages.values())

    def close(self) -> None:
        """Let go of the weights and give cached device memory back. The policy cannot answer afterwards."""
        del self._model
        if self._device.type == 'cuda':
            torch.cuda.empty_cache()

    def _run(
        self, observation: Observation, known: KnownActions | None
    ) -> tuple[np.ndarray[Any, np.dtype[np.float64]], dict[str, float]]:
        # Guidance differentiates through the network, which inference mode forbids.
        guided = known is not None and self._chunking == 'rtc_guided'
        with torch.no_grad() if guided else torch.inference_mode():
            return self._answer(observation, known)

    def _answer(
        self, observation: Observation, known: KnownActions | None
    ) -> tuple[np.ndarray[Any, np.dtype[np.float64]], dict[str, float]]:
        marks = [time.perf_counter()]
        state = np.asarray(observation.state, dtype=np.float64)[None]
        inputs = self._processor(
            [{name: view.rgb for name, view in observation.cameras.items()}],
            [{name: view.K for name, view in observation.cameras.items()}],
            state,
            [observation.instruction],
        )
        noise = self._noise(observation.stamp_ns).to(self._device)
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        self._mark(marks)
        continued = self._continued(known, state)
        prefix = self._model.encode_prefix(inputs, 'immutable' if 'guidance' in continued else 'auto')
        self._mark(marks)
        normalised = self._model.denoise(prefix, self._num_steps, noise=noise, solver=self._solver, **continued)
        self._mark(marks)
        actions = self._processor.unnormalize_actions(normalised, state)[0]
        self._mark(marks)
        spans = [1e3 * (after - before) for before, after in itertools.pairwise(marks)]
        return actions, dict(zip(('preprocess', 'prefix', 'denoise', 'postprocess'), spans, strict=True))

    def _continued(self, known: KnownActions | None, state: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
        """Arguments that make the sampler continue what is known; none in modes that do not."""
        if known is None or self._chunking not in ('rtc_guided', 'rtc_trained'):
            return {}
        previous = self._processor.normalize_actions(known.actions[None], state).to(self._device)
        if self._chunking == 'rtc_guided':
            return {'guidance': RealTimeGuidance(previous, known.committed, known.overlap)}
        # Beyond the longest prefix that training has shown the answer is free again; the planner joins it to the motion.
        return {'action_prefix': previous[:, : min(known.committed, self._longest_prefix)]}

    def _noise(self, stamp_ns: int) -> torch.Tensor:
        if self._seed is not None:
            # Odd multipliers spread neighbouring stamps and seeds over the 63 bits that the generator takes.
            mixed = (self._seed * 0x9E3779B97F4A7C15 + stamp_ns * 0xD1B54A32D192ED03) & (2**63 - 1)
            self._generator.manual_seed(mixed)
        return torch.randn(self._noise_shape, generator=self._generator)

    def _mark(self, marks: list[float]) -> None:
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        marks.append(time.perf_counter())
