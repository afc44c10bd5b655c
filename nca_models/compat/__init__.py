"""Drop-in for the NCAs people have: `cax` for CAX systems, `jax_nca` for jax-nca.

Neither package is needed to import these two; a call that needs one says how to install it. What
they are made of: `cax_facts` (what can be fused, and why not), `cax_calls` (what an accelerated
module does), `cax_attention`, `jax_nca_trainer`.
"""
