"""An off-screen OpenGL renderer for one MuJoCo model.

mujoco's own `Renderer` wants one context per image size and copies every image twice; this one keeps a single context and
buffer, draws any smaller size into a corner of it, and leaves out shadows and reflections, which cost 25 times the rest in
software.

Enters: a model and its state. Leaves: RGB arrays. One thread: the one that made it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.engine import RenderError, mujoco

_MAX_GEOMS = 256


class OffscreenRenderer:
    """Renders the cameras of ``model`` at up to ``width`` x ``height`` pixels. Raises RenderError without OpenGL."""

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        try:
            self._gl = mujoco.GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except (mujoco.FatalError, RuntimeError, ImportError, AttributeError) as error:
            raise RenderError(error) from error
        mujoco.mjr_resizeOffscreen(width, height, self._context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_HAZE] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._buffers: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def render(self, data: mujoco.MjData, camera: int, width: int, height: int) -> NDArray[np.uint8]:
        """A new uint8 array ``[height, width, 3]``, RGB, of what fixed camera number ``camera`` sees."""
        viewport = self._draw(data, camera, width, height)
        if (height, width) not in self._buffers:
            self._buffers[height, width] = np.empty((height, width, 3), dtype=np.uint8)
        buffer = self._buffers[height, width]
        mujoco.mjr_readPixels(buffer, None, viewport, self._context)
        upright: NDArray[np.uint8] = buffer[::-1].copy()  # OpenGL counts rows from the bottom
        return upright

    def depth(self, data: mujoco.MjData, camera: int, width: int, height: int) -> NDArray[np.float32]:
        """A new float32 array ``[height, width]``: depth along the optical axis, m."""
        viewport = self._draw(data, camera, width, height)
        buffer = np.empty((height, width), dtype=np.float32)
        mujoco.mjr_readPixels(None, buffer, viewport, self._context)
        near, far = (float(bound) * self._model.stat.extent for bound in (self._model.vis.map.znear, self._model.vis.map.zfar))
        metres: NDArray[np.float32] = near / (1.0 - buffer[::-1] * (1.0 - near / far))
        return metres

    def _draw(self, data: mujoco.MjData, camera: int, width: int, height: int) -> mujoco.MjrRect:
        self._gl.make_current()
        self._camera.fixedcamid = camera
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._context)
        return viewport

    def close(self) -> None:
        """Free the OpenGL context."""
        self._context.free()
        self._gl.free()
