"""Bags read without ROS: stored messages in the order of receipt, of damaged files as far as they go, on the clock of their stamps.

Enters: paths. Leaves: bytes with topic, type and time, and what was recorded of a command topic. Caller's thread.
"""
