"""An instruction counts as often as a tile runs it."""

import pytest

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


def constants(height: int, width: int) -> dict:
    axes = {"z": (1, 1, 1), "y": (height, 4, 3), "x": (width, 16, 3)}
    found = {"depth": 1, "height": height, "width": width}
    for axis, (size, tile, reach) in axes.items():
        found |= {f"tile_{axis}": tile, f"kernel_{axis}": reach, f"before_{axis}": reach // 2}
        found |= {f"tiles_{axis}": -(-size // tile)}
    return {**found, "tile": 64, "one_tile": True, "dense": False}


@pytest.mark.parametrize(
    ("height", "width", "inner"), [(12, 48, 1 / 9), (16, 48, 1 / 6), (9, 33, 1 / 9), (8, 48, 0)]
)
def test_tiles_at_borders_take_another_way(height, width, inner):
    """A tile has two blocks of 32 rows that all fire, and in some tiles no cell is at a border."""
    block = 3 + (1 - inner) * 3 + inner * 1
    expected = (2 + 2 * block) * LAUNCH.warps / 64
    found = warp_instructions_a_cell("step_forward", CODE, constants(height, width), LAUNCH, 1.0)
    assert found == pytest.approx(expected)


def test_without_products_nothing_is_told():
    code = CODE.replace("HMMA", "FFMA")
    assert warp_instructions_a_cell("step_forward", code, constants(8, 48), LAUNCH) is None
