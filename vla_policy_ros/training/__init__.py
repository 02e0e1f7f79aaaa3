"""Training of the policy network from examples: `Observation`s with the actions an expert took.

Enters: a training file (`config`), which names robot, network and data. Leaves: a run folder with log and states, and a checkpoint
folder with the statistics of the data it was trained on. Runs in the process of the command, or in those that `torchrun` starts.

    command ─ sources ─ scenes ─────┐
        └──── model ─── parameters ─┴ trainer ─ objective, optimizer, parallel, ema, state, progress ─ export
"""
