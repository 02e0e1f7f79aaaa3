"""Evaluation: how often a checkpoint does what the sentence says, in closed loop on scenes that were never trained on.

Enters: a checkpoint, tasks, seeds, variations. Leaves: success rates with intervals, failure classes, videos, JSON. In process the
policy and the simulated arm take turns on one thread (or one per ``--jobs``); over ROS the real node, topics and controllers run.
"""
