"""What Triton's kernels are compiled for, and how their weights are packed."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_kernels.backends.triton.constants import CompileTime
from nca_kernels.backends.triton.step_configuration import step_configuration
from nca_kernels.backends.triton.weights import pack, unpack
from nca_kernels.call import Operands, Weights
from nca_kernels.testing import CONFORMANCE
from nca_kernels.tuning import Launch

BY_NAME = {case.name: case for case in CONFORMANCE}
SMALL = Launch(tile=(1, 4, 16), rows=16, block_h=16, programs=3)


def operands_of(case, perceived=0):
    """Those of a ``step``, or of an ``update`` whose cells have ``perceived`` numbers each."""
    params, state, _, inputs = case.arguments()
    weights = Weights(params.perception, params.perception_bias, tuple(params.layers))
    perception = None
    if perceived:
        (first, bias), *others = params.layers
        inputs_size = 0 if inputs is None else inputs.shape[-1]
        first = jnp.resize(first, (perceived + inputs_size, first.shape[1]))
        weights = Weights(None, None, ((first, bias), *others))
        perception = jnp.zeros((1, *state.shape[:-1], perceived))
    inputs = None if inputs is None else inputs[None]
    weights = jax.tree.map(lambda w: jnp.asarray(w)[None], weights)
    return Operands(state[None], None, perception, inputs, weights)


def configuration(case, operands, launch=SMALL, precision="ieee"):
    call = SimpleNamespace(rule=case.rule, constant_taps=None)
    return step_configuration(
        call, operands, launch, precision=precision, rounds_by_instruction=False
    )


LAYOUTS = [
    ("plane", 0, 0),
    ("plane", 0, 64),  # side by side, with columns of ones
    ("dense_replicate", 0, 0),
    ("perception_bias", 0, 64),
    ("no_hidden", 0, 0),
    ("three_hidden", 0, 64),  # without biases
    ("inputs_per_cell", 0, 64),
    ("inputs_per_cell", 7, 0),
]


@pytest.mark.parametrize(("name", "perceived", "side_by_side"), LAYOUTS)
def test_weights_lie_where_kernels_look_for_them(name, perceived, side_by_side):
    """Each number at its offset, as loops find it; what no offset leads to is zero."""
    operands = operands_of(BY_NAME[name], perceived)
    launch = replace(SMALL, side_by_side=side_by_side)
    config, _ = configuration(BY_NAME[name], operands, launch)
    perception, packed = config.perception, config.packed
    assert perception.ones == (side_by_side > 0)
    array = np.array(pack(operands, packed, "ieee"))[0]
    assert array.size == packed.size

    def take(at, shape, strides):
        """Numbers that lie from ``at`` on; they are replaced by zeros."""
        index = at + sum(n * i for n, i in zip(strides, np.indices(shape), strict=True))
        numbers = array[index]
        array[index] = 0
        return numbers

    weights = jax.tree.map(lambda w: np.asarray(w[0]), operands.weights)
    filters, block_p, block_c = perception.filters, perception.block_p, config.block_c
    channels, width = config.channels, config.mlp.widths[0]
    hidden = weights.layers[0][0].shape[1]
    if perception.dense:
        *_, channels, outputs = weights.taps.shape
        taps = weights.taps.reshape(-1, channels, outputs)
        strides = block_c * block_p, block_p, 1
        np.testing.assert_array_equal(take(packed.taps_at, taps.shape, strides), taps)
        sees, by_filter = (outputs,), (1,)
    elif filters:
        taps = weights.taps.reshape(-1, channels, filters)
        strides = filters * block_c, 1, block_c
        np.testing.assert_array_equal(take(packed.taps_at, taps.shape, strides), taps)
        sees, by_filter = (channels, filters), (1, block_p)
    if filters:
        if weights.perception_bias is not None:
            bias = weights.perception_bias.reshape(sees)
            np.testing.assert_array_equal(take(packed.perception_bias_at, sees, by_filter), bias)
        rows = weights.layers[0][0][: np.prod(sees)].reshape(*sees, hidden)
        strides = *(width * n for n in by_filter), 1
        np.testing.assert_array_equal(take(packed.weight_at[0], rows.shape, strides), rows)
    first = weights.layers[0][0].shape[0] - sum(config.mlp.source_sizes)
    for at, size in zip(packed.source_at, config.mlp.source_sizes, strict=True):
        rows = weights.layers[0][0][first : first + size]
        np.testing.assert_array_equal(take(at, rows.shape, (width, 1)), rows)
        first += size
    for i, (weight, bias) in enumerate(weights.layers):
        if i > 0:
            strides = config.mlp.widths[i], 1
            np.testing.assert_array_equal(take(packed.weight_at[i], weight.shape, strides), weight)
        if bias is not None:
            np.testing.assert_array_equal(take(packed.bias_at[i], bias.shape, (1,)), bias)
    assert not array.any()


@pytest.mark.parametrize(("name", "perceived", "side_by_side"), LAYOUTS)
def test_unpacking_is_the_transpose_of_packing(name, perceived, side_by_side):
    """And as each number is packed once, it brings the weights back."""
    operands = operands_of(BY_NAME[name], perceived)
    launch = replace(SMALL, side_by_side=side_by_side)
    config, _ = configuration(BY_NAME[name], operands, launch)
    back = unpack(pack(operands, config.packed, "ieee"), operands, config.packed)
    jax.tree.map(np.testing.assert_array_equal, back, operands.weights)


def test_what_a_bias_loses_by_rounding_lies_behind_it():
    operands = operands_of(BY_NAME["plane"])
    launch = replace(SMALL, side_by_side=64)
    config, _ = configuration(BY_NAME["plane"], operands, launch, "bfloat16")
    array, bias = pack(operands, config.packed, "bfloat16")[0], operands.weights.layers[0][1][0]
    at, width = config.packed.bias_at[0], config.mlp.widths[0]
    whole, rest = (array[i : i + bias.size] for i in (at, at + width))
    assert (whole == whole.astype(jnp.bfloat16)).all()
    np.testing.assert_array_equal(whole + rest, bias)
    assert rest.any()


def test_a_grid_of_another_size_is_the_same_configuration():
    """So that it compiles nothing; a size of another kind is another one."""
    case = replace(BY_NAME["plane"], grid=(48, 48))
    config, sizes = configuration(case, operands_of(case))
    for grid, same in (((80, 64), True), ((48, 50), False), ((1, 48), False)):
        other = replace(case, grid=grid, batch=(3,))
        config_of_other, sizes_of_other = configuration(other, operands_of(other))
        assert (config_of_other == config) == same
        assert (CompileTime(config_of_other) == CompileTime(config)) == same
        assert (hash(config_of_other) == hash(config)) == same
        assert sizes_of_other != sizes


def test_what_is_derived_is_part_of_the_name_in_tritons_cache():
    """Else a kernel of an older version could be taken for the one that a property now means."""
    config, _ = configuration(BY_NAME["plane"], operands_of(BY_NAME["plane"]))
    text = repr(CompileTime(config))
    for name in ("channels", "block_c", "low_edge", "words_at", "weight_at", "borders_fold_back"):
        assert f"'{name}': " in text
    assert "0x" not in text  # no addresses
