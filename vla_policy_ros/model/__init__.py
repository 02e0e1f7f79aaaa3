"""The network, as transformers classes: configuration, towers, deep fusion, flow matching and processor.

Enters: images (RGB uint8), intrinsics, state, instruction. Leaves: a loss, or a chunk of actions in robot units once the processor
has un-normalised it. Knows nothing of robots, ROS or files other than its own checkpoints. Runs on whichever thread calls it; the
policy room calls it from the executor thread.
"""
