"""A simulated robot: a 7-joint arm over a table with coloured objects, its scripted expert and its ROS face.

Enters: seeds, joint position targets, an instruction. Leaves: rendered `CameraView`s with intrinsics, joint states, expert
chunks and training examples of the same `Observation` type that the live node assembles. Everything runs on the caller's
thread; a `TabletopWorld` owns an OpenGL context and therefore stays on the thread that created it.

`mjcf` describes the bodies, `scene` draws what varies between episodes, `world` is the physics and the cameras, `expert` the
teacher, `instructions` the sentences, `dataset` the training examples, `controller` the drive between trajectories and
physics, `ros_node` the topics. Only `ros_node` imports rclpy.
"""

from __future__ import annotations

import os

# Both are read when mujoco and Mesa are first loaded, hence here, before any module of this package imports mujoco. Without a
# display mujoco's own default cannot render; and Mesa's pool of raster threads costs 40 % more CPU in sum than drawing on
# this thread.
os.environ.setdefault('MUJOCO_GL', 'egl')
os.environ.setdefault('LP_NUM_THREADS', '0')
