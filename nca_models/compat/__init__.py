"""Drop-in for the NCAs people have: `cax` for CAX systems, `jax_nca` for jax-nca.

Neither package is needed to import these modules; a call that needs one says how to install it.
"""
