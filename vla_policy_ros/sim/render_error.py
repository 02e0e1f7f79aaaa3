"""The error of a machine that cannot draw, apart from the import of MuJoCo that may raise it."""

from __future__ import annotations

import os


class RenderError(RuntimeError):
    """No OpenGL context can be had; the message names the remedy."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(
            f'the simulator cannot draw with MUJOCO_GL={os.environ.get("MUJOCO_GL", "")!r} ({cause}): install libegl1 and '
            'libgl1-mesa-dri, or libosmesa6 and set MUJOCO_GL=osmesa; where mujoco is imported before vla_policy_ros.sim, '
            'set MUJOCO_GL first'
        )
