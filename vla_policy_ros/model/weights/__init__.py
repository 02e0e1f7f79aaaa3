"""Base checkpoints: weights of the public parts, under our names, in one streamed pass.

Enters: a network configuration and local folders of public checkpoints (any subset of language, vision, geometry). Leaves: sharded
safetensors files and a report that accounts for every tensor: loaded, left out and why, or randomly initialised. What a folder
lacks, holds too much, or holds in another shape is an error, never a silent partial load; nothing is unpickled or downloaded.

`sources` reads folders, `rules` is the table of names, `sizes` takes over the sizes that the folders state, `plan` decides where
every tensor comes from, `random_start` makes those that come from nowhere, `writer` streams. Any thread.
"""
