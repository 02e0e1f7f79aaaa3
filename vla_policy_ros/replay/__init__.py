"""Recordings judged without ROS.

Enters: bags (rosbag2, mcap or sqlite3), or messages that were heard live, each with the time at which it arrived. Leaves: frozen
reports, as text for operators and as plain dictionaries for JSON. Pure functions on the caller's thread; time is the recording's.

- `bag_reading`: the stored messages of a bag in order of receipt; `mcap_recovery` and `sqlite_recovery` for damaged files.
- `bag_trajectories`: bag -> `Recording` of each command topic, on the clock of the controller.
- `recording`: what a recording is, and messages (rclpy's or rosbags', read by attribute) to those of the controller emulator.
- `lint_profile`: which controller is meant: its joints, rate, parameters and limits.
- `trajectory_lint`: what that controller would reject or turn into a step; `lint_report`: how it is told.
"""
