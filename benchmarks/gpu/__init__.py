"""Everything that needs a GPU, for a person who has one for fifteen minutes.

``python -m benchmarks.gpu --out DIR`` (``make gpu``) finds out, in the order of what is worth most:
whether the kernels run at all, whether they are right, how fast they are, which launches are
faster, and the rest. What is found is on disk at once. ``python -m benchmarks.gpu.kit --out DIR``
(``make gpu-kit``) compiles its kernels beforehand, on a machine without a GPU.

``stages`` is the table. ``runner`` is the parent process, which never touches the GPU; ``child`` is
what it starts, ``work`` what that works on: ``items``, which are in ``checks``, ``graphs``,
``timings`` and ``variants``. ``results`` are the files, ``report`` is what they say in words.
"""
