"""The demonstration: simulator and policy node as separate processes, watched, recorded and summed up.

Enters: options, and what the observer in `ros/` hears on topics. Leaves: a live panel, a bag, a video and a summary. `session` runs
on the main thread; the observer's rclpy executor has a thread of its own, which also writes the bag. The other modules know nothing
of rclpy.
"""
