"""Everything that needs a GPU, for a person who has one for fifteen minutes.

``python -m benchmarks.gpu --out DIR`` (``make gpu``) finds out, the most valuable first, whether
the kernels run at all, whether they are right, how fast they are, which launches are faster, and
the rest. Each result is on disk at once.
``python -m benchmarks.gpu.kit --out DIR`` (``make gpu-kit``) compiles the kernels beforehand, on a
machine without a GPU.

``stages`` is the table of stages. ``runner`` is the parent process, which never touches the GPU. It
starts children (``child``), which work through items (``work``, ``items``); the items are in
``checks``, ``graphs``, ``timings`` and ``variants``. ``results`` writes the files, and ``report``
puts them into words.
"""
