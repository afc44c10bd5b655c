"""Neural cellular automata in Flax: models, training, pictures and the command `nca`.

The names below load on first use, so `import nca_models` is quick and the command line can
refuse wrong input before JAX starts.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_NEEDED = ("flax", "optax", "orbax.checkpoint", "tqdm", "PIL", "imageio", "matplotlib")


def _missing(modules: tuple[str, ...]) -> list[str]:
    """Return the top-level names of `modules` that are not installed."""
    return [name for name in (m.partition(".")[0] for m in modules) if find_spec(name) is None]


if _absent := _missing(_NEEDED):
    raise ImportError(
        f'nca_models needs {", ".join(_absent)}: run `pip install "nca-kernels[models]"`'
    )

if TYPE_CHECKING:
    from nca_models.modules import NCA as NCA
    from nca_models.training.config import TrainConfig as TrainConfig
    from nca_models.training.trainer import train as train

_HOMES = {
    "NCA": "nca_models.modules",
    "TrainConfig": "nca_models.training.config",
    "train": "nca_models.training.trainer",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nca_models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
