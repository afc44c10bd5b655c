"""What the drop-ins need to be imported: the library they stand in for, and little more."""

import os
import subprocess
import sys

import pytest

BLOCKED = (
    *("imageio", "matplotlib", "orbax", "PIL", "skimage", "sklearn", "cv2"),
    *("tensorboardX", "tqdm", "psutil"),
)
USES = {
    "cax": """
from nca_models.compat.cax import accelerate
from tests.nca_models.compat.cax_systems import Growing, arguments
from flax import nnx
final = accelerate(Growing(rngs=nnx.Rngs(0)), strict=True)(arguments(Growing)[0], num_steps=2)
""",
    "jax_nca": """
import jax
from nca_models.compat.jax_nca import NCA, EmojiTrainer, ImageDataset
nca, key = NCA(num_hidden_channels=4), jax.random.key(0)
seed = nca.create_seed(4, shape=(8, 8))
final = nca.multi_step(nca.init(key, seed, key)["params"], seed, key, num_steps=2)[0]
""",
}


@pytest.mark.parametrize("name", USES)
def test_needs_no_package_for_pictures_or_checkpoints(name):
    if name == "cax":
        pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")
    block = f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n"
    code = f"{block}{USES[name]}print(final.shape)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 0, run.stderr


def test_what_is_missing_is_named_where_it_is_needed():
    code = (
        "import sys; sys.modules['orbax'] = None\n"
        "import nca_models\n"
        "try:\n    nca_models.train\n"
        "except ImportError as error:\n    print(error)\n"
        "import nca_models.cli"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'orbax: run `pip install "nca-kernels[models]"`' in run.stdout
    assert 'orbax: run `pip install "nca-kernels[models]"`' in run.stderr
