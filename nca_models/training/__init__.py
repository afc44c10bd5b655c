"""Training: sample pool, damage, the loop, checkpoints and logs.

Imports nothing heavy, so that the command line can check names before JAX starts.
"""

DAMAGE_NAMES = ("none", "circle", "half", "mixed", "left", "right", "top", "bottom", "noise")
