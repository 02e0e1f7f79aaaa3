"""From an action chunk to what a joint trajectory controller executes well.

Enters: an `ActionChunk`, the current time, and the motion commanded so far (`CommandedMotion`). Leaves: a `Plan`, which holds a
`JointTrajectory` whose interpolant respects every joint limit and ends at rest, or the reason why nothing may be sent. Any
single thread; nothing here keeps time or state of its own except `CommandedMotion` and the controller emulator, which their
owner updates. Imports numpy only; MuJoCo when a workspace is configured, to read its URDF.

- `limits`: position, velocity and acceleration limits as arrays.
- `check`: exact extrema of a trajectory's cubic interpolant, the last gate before anything is published.
- `kinematics`, `workspace`: where the tip of the arm is, and a box that it stays in on the interpolant.
- `commanded`, `timeline`: what has been commanded, as one continuous motion; when things happen, and how chunks follow each other.
- `chunk_path`, `follower`, `smoothing`, `planner`: expire, join, follow within the limits, rest.
- `moves`: one-shot moves to a pose. `acceptance`: whether a controller executes what was published.
- `jtc`, `jtc_trajectory`, `jtc_blending`, `jtc_stopping`, `jtc_rules`: emulator of the joint_trajectory_controller, Humble to
  Rolling, for the simulator, the tests and for lint. `jtc_advice`: what its parameters mean for who sends to it.
"""
