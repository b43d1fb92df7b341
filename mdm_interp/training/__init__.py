"""How models come about: losses, the resumable loop, the store of runs, and demo checkpoints.

Which models an experiment wants does not belong here.
"""
