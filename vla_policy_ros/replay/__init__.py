"""Recordings judged without ROS.

Enters: bags (rosbag2, mcap or sqlite3), or messages that were heard live, each with the time at which it arrived. Leaves: frozen
reports, as text for operators and as plain dictionaries for JSON. Pure functions on the caller's thread; time is the recording's.

What was sent to a controller (`vla-policy lint`):

- `bag_trajectories`: bag -> `Recording` of each command topic, on the clock of the controller.
- `lint_profile`: which controller is meant: its joints, rate, parameters and limits.
- `trajectory_lint`: what that controller would reject or turn into a step; `lint_report`: how it is told.

What a policy would have done (`vla-policy replay`):

- `offline`: the runtime of the live node on the clock of the bag; `latency`: how late its answers are.
- `metrics`: what follows from bag, seed and checkpoint alone; `gate`: what must hold of it.
- `pictures`: stale frames, made-up calibrations, the moments of the largest errors.
- `document`, `figures`, `page`, `annotate`: the report as JSON, SVG, HTML and a bag; `command` writes them, bag by bag.
- `reproduce`: what a live node was asked, asked again.
"""
