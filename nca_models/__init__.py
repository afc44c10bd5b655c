"""Neural cellular automata in Flax: models, training, pictures and the command `nca`.

The names below load on first use, so `import nca_models` is quick and the command line can
refuse wrong input before JAX starts.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_NEEDED = ("flax", "optax", "orbax.checkpoint", "tqdm", "PIL", "imageio", "matplotlib")


def _require(modules: tuple[str, ...] = _NEEDED) -> None:
    """Raise an ImportError that names the extra if a module is not installed."""
    names = (module.partition(".")[0] for module in modules)
    if absent := [name for name in names if find_spec(name) is None]:
        raise ImportError(
            f'nca_models needs {", ".join(absent)}: run `pip install "nca-kernels[models]"`'
        )


_require(("flax",))  # The rest is not needed by `nca_models.compat` and `nca_models.modules`.

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
    _require()
    return getattr(importlib.import_module(_HOMES[name]), name)
