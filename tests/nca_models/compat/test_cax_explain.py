"""What `explain`, `strict` and the warnings say, against what a traced step holds."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")

from cax.core import ComplexSystem
from cax.core.perceive import ConvPerceive, Perceive
from cax.core.update import NCAUpdate
from flax import nnx

from nca_models.compat import cax_watch
from nca_models.compat.cax import accelerate, explain
from tests.nca_models.compat.cax_systems import (
    EXAMPLES,
    Attention,
    Conditional,
    Growing,
    System,
    arguments,
    make_perceive,
)

FUSED = "perceive (ConvPerceive): fused into the update that receives its perception"
ALONE = "perceive (ConvPerceive): left as it is: no fused update receives its perception"


def quietly(cs, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate(cs, *arguments, **keywords)


def explained(capsys, *arguments):
    """The lines that `explain` prints about parts."""
    capsys.readouterr()
    explain(*arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith('backend "auto" is ')
    return lines[:-1]


def convolutions(cs, state, input=None):
    """How many convolutions other than the update's a step holds that something uses."""
    graph, content = nnx.split(cs)

    def step(content, state, input):
        copy = nnx.merge(graph, content)
        return copy._step(state, input), nnx.split(copy)[1]

    jaxpr = cax_watch.needed(jax.make_jaxpr(step)(content, state, input))
    equations = cax_watch.equations(jaxpr)
    return sum(e.primitive.name == "conv_general_dilated" for e in equations)


# ---- systems whose parts are not all fused ----


class OwnPerceive(Perceive):
    """A perceive with a `ConvPerceive` inside, whose perception it changes."""

    def __init__(self, channels, rngs):
        self.conv = make_perceive(2, channels, rngs)

    def __call__(self, state):
        return jnp.sqrt(self.conv(state) ** 2 + 1e-6)


class Nested(System):
    def __init__(self, *, rngs):
        self.perceive = OwnPerceive(self.channels, rngs)
        self.update = self.new_update(3 * self.channels, rngs)


class Clip(NCAUpdate):
    def __call__(self, state, perception, input=None):
        return jnp.clip(super().__call__(state, perception, input), -1, 1)


class Clipped(System):
    make_update = Clip

    def new_update(self, perception_size, rngs):
        return Clip(
            channel_size=self.channels,
            perception_size=perception_size,
            hidden_layer_sizes=(4,),
            rngs=rngs,
        )


class OwnUpdate(System):
    def new_update(self, perception_size, rngs):
        return nnx.Linear(perception_size, self.channels, rngs=rngs)

    def _step(self, state, input=None, *, sow=False):
        return self.done(state + self.update(self.perceive(state)), sow)


class Circular(System):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.perceive.conv.padding = "CIRCULAR"


class LooksAtPerception(Growing):
    def _step(self, state, input=None, *, sow=False):
        perception = self.perceive(state)
        return self.done(self.update(state, perception, input) + 0.01 * perception.mean(), sow)


class SlopesDiffer(System):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.perceive.activation_fn = partial(nnx.leaky_relu, negative_slope=0.1)
        self.update.activation_fn = partial(nnx.leaky_relu, negative_slope=0.2)


class TwoUpdates(System):
    """The second update gets the perception of another state."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.second = self.new_update(self.perceive.conv.out_features, rngs)
        self.unused = make_perceive(2, self.channels, rngs)

    def _step(self, state, input=None, *, sow=False):
        perception = self.perceive(state)
        return self.done(self.second(self.update(state, perception), perception), sow)


class InsideTransforms(Growing):
    """The parts are called in transformations of nnx, which make modules of their own."""

    def _step(self, state, input=None, *, sow=False):
        run = nnx.jit(nnx.remat(lambda self, state: self.update(state, self.perceive(state))))
        return self.done(run(self, state), sow)


class Empty(ComplexSystem):
    def _step(self, state, input=None, *, sow=False):
        return state


UPDATE, MASK = "update (NCAUpdate): fused", "update (alive mask): fused"
SAYS = {
    Growing: (FUSED, UPDATE, MASK),
    InsideTransforms: (FUSED, UPDATE, MASK),
    Nested: (
        "perceive (OwnPerceive): left as it is: its __call__ is not that of ConvPerceive",
        ALONE.replace("perceive (", "perceive.conv ("),
        UPDATE,
        MASK,
    ),
    Clipped: (ALONE, "update (Clip): left as it is: its __call__ is not that of MLPUpdate or"),
    OwnUpdate: (ALONE,),
    Circular: (FUSED, UPDATE, "update (alive mask): left as it is: it sees nothing beyond the bor"),
    LooksAtPerception: (
        "perceive (ConvPerceive): fused into an update, but computed as well: something else than",
        UPDATE,
        MASK,
    ),
    SlopesDiffer: (
        "perceive (ConvPerceive): left as it is: its activation is leaky_relu of slope 0.1, that "
        "of the update is leaky_relu of slope 0.2",
        UPDATE,
        MASK,
    ),
    TwoUpdates: (
        "perceive (ConvPerceive): fused into an update, but computed as well",
        "second (NCAUpdate): fused",
        "second (alive mask): fused",
        "unused (ConvPerceive): not used in this step",
        UPDATE,
        MASK,
    ),
}


@pytest.mark.parametrize("system", SAYS)
def test_one_line_for_each_part_and_strict_agrees(system, capsys):
    expected = SAYS[system]
    plain, fast = system(rngs=nnx.Rngs(0)), system(rngs=nnx.Rngs(0))
    state, _ = arguments(system)
    heading, *would = explained(capsys, plain, state)
    assert heading == "not accelerated; accelerate(cs) would make it:"
    left = [line for line in would if "left as it is" in line or "computed as well" in line]
    if left:
        with pytest.raises(ValueError, match=r"left as it is|computed as well") as error:
            accelerate(fast, strict=True)
        assert all(line in str(error.value) for line in left)
        assert ("nothing in this" in str(error.value)) == (not any(": fused" in w for w in would))
        with pytest.raises(ValueError, match=r"left as it is|computed as well"):
            accelerate(fast, strict=True, state=state)
        assert explained(capsys, fast)[0] == heading, "a refused system was changed"
        with pytest.warns(UserWarning, match=r"left as it is|computed as well") as caught:
            accelerate(fast)
        assert [str(w.message) for w in caught] == [str(error.value)]
    else:
        accelerate(fast, strict=True)
    lines = explained(capsys, fast, jax.ShapeDtypeStruct(state.shape, state.dtype))
    assert lines == would
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
    perceives = [line for line in lines if "Perceive)" in line]
    fused = all(": fused into the update" in line or "not used" in line for line in perceives)
    assert (convolutions(fast, state) == 0) == fused


@pytest.mark.parametrize("system", EXAMPLES)
def test_examples(system, capsys):
    """What is said to be fused leaves no convolution; no example needs a state for that."""
    fast, (state, input) = quietly(system(rngs=nnx.Rngs(0))), arguments(system)
    lines = explained(capsys, fast, state, input)
    fused = all(": fused" in line for line in lines)
    assert fused == (system is not Attention)
    assert convolutions(fast, state, input) == 0
    if fused:
        accelerate(system(rngs=nnx.Rngs(0)), strict=True)
        accelerate(system(rngs=nnx.Rngs(0)), strict=True, state=state, input=input)
    else:
        with pytest.raises(ValueError, match="MooreAttentionPerceive is the fused form"):
            accelerate(system(rngs=nnx.Rngs(0)), strict=True)


def test_nothing_is_drawn_and_nothing_changes():
    cs = quietly(Growing(rngs=nnx.Rngs(0)))
    before, classes = nnx.to_pure_dict(nnx.state(cs, nnx.RngCount)), type(cs.update)
    explain(cs, arguments(Growing)[0])
    assert before == nnx.to_pure_dict(nnx.state(cs, nnx.RngCount))
    assert type(cs.update) is classes


def test_a_part_that_came_later(capsys):
    cs, state = accelerate(Growing(rngs=nnx.Rngs(0))), arguments(Growing)[0]
    cs.update = Growing(rngs=nnx.Rngs(1)).update
    later = "update (NCAUpdate): left as it is: it was added after accelerate: call accelerate(cs)"
    lines = explained(capsys, cs, state)
    assert lines[0].startswith(ALONE)
    assert lines[1].startswith(later)
    assert any(line.startswith(later) for line in explained(capsys, cs))
    accelerate(cs, strict=True)
    assert explained(capsys, cs, state) == [FUSED, UPDATE, MASK]


def test_without_a_state_only_the_parts_are_known(capsys):
    lines = explained(capsys, quietly(Nested(rngs=nnx.Rngs(0))))
    assert lines[1].startswith("perceive.conv (ConvPerceive): can be fused into an update that")
    assert lines[-1].startswith("only the parts are known here: explain(cs, state) shows")
    lines = explained(capsys, quietly(Clipped(rngs=nnx.Rngs(0))))
    assert lines[0].endswith("left as it is: no update of the system can be fused with it")
    lines = explained(capsys, quietly(Circular(rngs=nnx.Rngs(0))))
    assert lines[2].startswith("update (alive mask): left as it is: its pool sees nothing beyond")


def test_a_step_that_cannot_be_traced_without_its_grid():
    """The parts are judged then, and `state=` tells more."""

    class OneGrid(LooksAtPerception):
        def _step(self, state, input=None, *, sow=False):
            return super()._step(state + jnp.ones(self.grid)[..., None], input, sow=sow)

    accelerate(OneGrid(rngs=nnx.Rngs(0)), strict=True)
    state, _ = arguments(OneGrid)
    with pytest.raises(ValueError, match="computed as well"):
        accelerate(OneGrid(rngs=nnx.Rngs(0)), strict=True, state=state)
    with pytest.raises(ValueError, match="a step of the system cannot be traced: TypeError"):
        accelerate(OneGrid(rngs=nnx.Rngs(0)), state=state[:-1])


def test_nothing_to_fuse(capsys):
    with pytest.raises(ValueError, match="nothing in this Empty is fused: it has no perceive"):
        accelerate(Empty(), strict=True)
    with pytest.warns(UserWarning, match="nothing in this Empty is fused"):
        cs = accelerate(Empty())
    assert explained(capsys, cs, jnp.zeros((4, 4, 2)))[1].startswith("nothing to fuse")


def test_a_forgotten_input(capsys):
    cs, (state, input) = accelerate(Conditional(rngs=nnx.Rngs(0))), arguments(Conditional)
    lines = explained(capsys, cs, state)
    assert "a step of the system cannot be traced: TypeError" in lines[-1]
    assert lines[-1].endswith("If the step takes an input, give one: explain(cs, state, input)")
    assert lines[0].startswith("perceive (ConvPerceive): can be fused")
    assert explained(capsys, cs, state, input)[0] == FUSED
    with pytest.raises(ValueError, match=r"accelerate\(cs, state=state, input=input\)"):
        accelerate(cs, state=state)
    with pytest.raises((TypeError, ValueError)):
        explain(cs, state, np.zeros((7, 5), np.float32))


def test_a_convolution_of_the_users_own_is_left_out():
    """It is no part of CAX: nothing is said about it, and the rest is fused."""

    class Blurs(Growing):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.blur = nnx.Conv(self.channels, self.channels, (3, 3), rngs=rngs)

        def _step(self, state, input=None, *, sow=False):
            return super()._step(0.1 * self.blur(state), input, sow=sow)

    cs = accelerate(Blurs(rngs=nnx.Rngs(0)), strict=True)
    assert convolutions(cs, arguments(Blurs)[0]) == 1


def test_two_perceives_of_which_one_is_computed(capsys):
    """A perception that is handed over joined with another one is not fused."""

    class Joined(Growing):
        def __init__(self, *, rngs):
            self.perceive = make_perceive(2, self.channels, rngs)
            self.wide = ConvPerceive(
                channel_size=self.channels, perception_size=5, kernel_size=(5, 5), rngs=rngs
            )
            self.update = self.new_update(3 * self.channels + 5, rngs)

        def _step(self, state, input=None, *, sow=False):
            perceptions = [self.perceive(state), self.wide(state)]
            return self.done(self.update(state, jnp.concatenate(perceptions, -1)), sow)

    cs, state = quietly(Joined(rngs=nnx.Rngs(0))), arguments(Joined)[0]
    lines = explained(capsys, cs, state)
    assert lines[0].startswith(ALONE)
    assert lines[-1].startswith(ALONE.replace("perceive (", "wide (", 1))
    assert convolutions(cs, state) == 2
