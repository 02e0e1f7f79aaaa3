"""Ablations: each table of docs/results.md from one command, ``python -m vla_policy_ros.evaluation.ablations NAME``.

Enters: a checkpoint, or a training file and a budget. Leaves: one JSON file per table, and the page that is put together from them.
"""
