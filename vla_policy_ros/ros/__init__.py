"""The only room that knows ROS: nodes, parameters, conversions, status and diagnostics.

Enters: ROS messages, parameters, lifecycle transitions and services. Leaves: trajectories for controllers, chunks with their
provenance, status and diagnostics. Everything runs on the thread of one single-threaded rclpy executor; the policy's own thread
only wakes it through a guard condition.
"""
