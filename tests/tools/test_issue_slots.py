"""An instruction counts as often as a tile runs it."""

from types import SimpleNamespace

import pytest

from nca_kernels.backends.triton.geometry import Axis, Sizes
from nca_kernels.tuning import Launch
from tests.tools.issue_slots import warp_instructions_a_cell

CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   ISETP.GE P1, PT, R1, RZ, PT ;
        /*0030*/               @P1 LDG.E R2, [R4.64] ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   LDG.E R2, [R4.64] ;
.L_x_2:
        /*0060*/                   HMMA.1684.F32.TF32 R8, R8, R2, R8 ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""
LAUNCH = Launch(tile=(1, 4, 16), rows=32, warps=4)


Z = Axis(tile=1, kernel=1, pool=1, near=False)
Y = Axis(tile=4, kernel=3, pool=3, near=True)
X = Axis(tile=16, kernel=3, pool=3, near=True)
CONFIG = SimpleNamespace(
    axes=(Z, Y, X),
    tile_cells=64,
    pool_positions=9,
    one_tile=True,
    perception=SimpleNamespace(dense=False),
)


def counted(height, width, code=CODE, config=CONFIG):
    """Instructions a cell of ``step_forward``, where all cells fire."""
    sizes = Sizes(1, height, width, samples=1)
    return warp_instructions_a_cell("step_forward", code, config, sizes, LAUNCH, 1.0)


@pytest.mark.parametrize(
    ("height", "width", "inner"), [(12, 48, 1 / 9), (16, 48, 1 / 6), (9, 33, 1 / 9), (8, 48, 0)]
)
def test_tiles_at_borders_take_another_way(height, width, inner):
    """A tile has two blocks of 32 rows that all fire, and in some tiles no cell is at a border."""
    block = 3 + (1 - inner) * 3 + inner * 1
    expected = (2 + 2 * block) * LAUNCH.warps / 64
    assert counted(height, width) == pytest.approx(expected)


def test_without_products_nothing_is_told():
    assert counted(8, 48, CODE.replace("HMMA", "FFMA")) is None


def test_with_large_pools_nothing_is_told():
    """Their loops look like others."""
    config = SimpleNamespace(**{**vars(CONFIG), "pool_positions": 125})
    assert counted(8, 48, config=config) is None
