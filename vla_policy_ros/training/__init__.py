"""Training of the policy network from examples: `Observation`s with the actions an expert took.

Enters: a robot file, a preset or a checkpoint, an iterable of examples. Leaves: a checkpoint folder with the statistics of the data
it was trained on, and a log. Runs in the process of the command, on as many threads as torch is given.
"""
