"""Drop-in for the NCAs people have: `cax` for CAX systems, `jax_nca` for jax-nca.

Neither package is needed to import these two; a call that needs one says how to install it. What
they are made of: `cax_activations` and `cax_facts` (what can be fused, and why not), `cax_classes`
(the classes of accelerated modules), `cax_calls` (what these do), `cax_watch` and `cax_report`
(what a traced step really runs), `cax_checks`, `cax_attention`, `jax_nca_trainer`.
"""
