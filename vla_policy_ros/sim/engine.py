"""MuJoCo, imported once and with a clear error: it loads an OpenGL library on import, and fails obscurely without one."""

from __future__ import annotations

from vla_policy_ros.sim.render_error import RenderError

try:
    import mujoco
except (ImportError, AttributeError, RuntimeError, OSError) as error:
    raise RenderError(error) from error

__all__ = ['RenderError', 'mujoco']
