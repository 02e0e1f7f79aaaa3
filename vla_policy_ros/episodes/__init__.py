"""Recorded episodes: bags and LeRobot datasets as the observations that the live node would have made, and what was commanded.

Enters: a robot file and a recording: a rosbag2 bag, or a LeRobot dataset (v2.0, v2.1, v3.0) as a folder. Leaves: `Episode`s,
reports on their quality, and recordings of the other kind. Images are decoded one at a time, when they are asked for. Caller's
thread.

- `episode`: what an episode is; `commands`: what was commanded, at any time.
- `bag_episode`: bag -> `Episode`, through the same `observation/` code as the live node, in the order of receipt.
- `lerobot`: LeRobot folder -> `Episode`s; `mapping`: which feature is which camera, joint and field; `video`: frames of mp4 files.
- `sources`: what kind of recording a path is, and its episodes.
- `lerobot_writer`, `bag_writer`: `Episode`s -> recordings; `convert` drives them.
- `sim_recording`: the simulator with its expert as an `Episode`.
- `quality`: gaps, skew, stale frames and rates; `quality_report`: how it is told.
"""
