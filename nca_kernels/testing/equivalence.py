"""Checks whether a step that someone wrote is ``nk.step``, and if not, says which part differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import nca_kernels as nk
from nca_kernels.rule import ACTIVATIONS, PADDINGS, Alive, Rule, RuleParams
from nca_kernels.testing.compare import error_ratio

_Probe = tuple[Any, ...]  # the arguments of a step: state, key and, if it takes them, inputs


def check_equivalent(
    their_step: Callable[..., Any],
    rule: Rule,
    params: RuleParams,
    *,
    state: Any = None,
    key: Any = None,
    inputs: Any = None,
    gradients: bool = True,
    limit: float = 1e-5,
) -> None:
    """Check that ``their_step(state, key)`` computes ``nk.step(rule, params, state, key)``.

    If it does not, looks for the part that differs: order, direction or scale of the taps,
    padding, activation, biases, inputs, how the mask is drawn and scaled, alive mask; a single
    part, or two.

    Args:
        their_step: ``(state, key) -> state``, or ``(state, key, inputs) -> state`` if ``inputs``
            is given, with their own parameters in it.
        rule, params: what ``nk.step`` would take in its place.
        state: ``[*batch, *spatial, C]``, an example; random numbers in place of its values are
            tried, too. By default a small odd grid and a batch of 2. Part of the grid should be
            empty for the alive mask to show.
        key: a JAX random key; ``jax.random.key(0)`` by default.
        inputs: as for ``nk.step``, if their step takes any.
        gradients: compare the gradient to the state as well.
        limit: the largest error ratio ``norm(theirs - ours) / norm(ours)``.

    Raises:
        ValueError, TypeError: ``rule`` and ``params`` make no step, as :func:`nca_kernels.step`.
        AssertionError: it is another step; says what would make it the same, or where they differ.

    Example:
        >>> nk.testing.check_equivalent(lambda s, k: my_step(my_params, s, k), rule, params)
    """
    key = jax.random.key(0) if key is None else key
    optional_inputs = () if inputs is None else (inputs,)

    def our_step(state: Array, key: Any, inputs: Any = None) -> Array:
        return nk.step(rule, params, state, key, inputs, backend="reference")

    probes = [(state, key, *optional_inputs) for state, key in _probes(rule, params, state, key)]
    ours = [our_step(*probe) for probe in probes]
    theirs = [their_step(*probe) for probe in probes]
    _check_shapes(probes, theirs)
    ratios = [error_ratio(a, b) for a, b in zip(theirs, ours, strict=True)]
    worst = int(np.argmax(ratios))
    if ratios[worst] > limit:
        model = _Model(rule, params, has_inputs=inputs is not None)
        reason = _explanations(model, probes, theirs, limit) or _where(
            model, ours[worst], theirs[worst], probes[worst][0]
        )
        raise AssertionError(
            "their step is not nk.step with this rule and these params "
            f"(error {ratios[worst]:.2g}). {reason}"
        )
    if gradients:
        _check_gradients(their_step, our_step, probes[0], 10 * limit)


def _check_shapes(probes: Sequence[_Probe], theirs: Sequence[Array]) -> None:
    for (state, *_), out in zip(probes, theirs, strict=True):
        if np.shape(out) != state.shape or out.dtype != state.dtype:
            raise AssertionError(
                f"their step makes {out.dtype}{list(np.shape(out))} of a state that is "
                f"{state.dtype}{list(state.shape)}; it must keep shape and dtype"
            )


def _check_gradients(
    their_step: Callable[..., Any], our_step: Callable[..., Any], probe: _Probe, limit: float
) -> None:
    state, *rest = probe
    weights = jnp.cos(jnp.arange(state.size, dtype=state.dtype)).reshape(state.shape)

    def gradient(step: Callable[..., Any]) -> Array:
        return jax.grad(lambda state: jnp.sum(weights * step(state, *rest)))(state)

    ratio = error_ratio(gradient(their_step), gradient(our_step))
    if ratio > limit:
        raise AssertionError(
            f"their step has the values of nk.step, but another gradient to the state (error "
            f"{ratio:.2g}): is there a stop_gradient in it, or a gradient of its own?"
        )


def _probes(rule: Rule, params: RuleParams, state: Any, key: Any) -> list[tuple[Array, Any]]:
    """(state, key) to try: the example if there is one, and random states, partly empty."""
    dims = np.ndim(params.perception) - 2
    probes = []
    if state is None:
        channels = np.shape(params.layers[-1][0])[-1]
        shape, dtype = (2, *(9, 8, 7)[:dims], channels), jnp.dtype("float32")
    else:
        probes = [(jnp.asarray(state), key)]
        shape, dtype = probes[0][0].shape, probes[0][0].dtype
    random = np.random.default_rng(0)
    half = np.arange(shape[-2]) < max(0.6 * shape[-2], 1)
    values = 0.5 * random.normal(size=shape)
    probes.append((jnp.asarray(values * half[:, None], dtype), key))
    for i in range(_FEW_CELLS):  # just alive: a step kills some of them, and wakes others
        values = 2 * random.normal(size=shape) * (random.random(shape[:-1]) < 0.06)[..., None]
        if rule.alive is not None:
            alive = values[..., rule.alive.channel]
            alive[alive != 0] = rule.alive.threshold + 0.02
        probes.append((jnp.asarray(values, dtype), jax.random.fold_in(key, i)))
    return probes


_FEW_CELLS = 6  # probes with few living cells


# ---- a step whose parts can be changed ----


def _bernoulli(key: Any, rate: float, shape: tuple[int, ...], dims: int) -> Array:
    return jax.random.bernoulli(key, rate, shape[:-1])[..., None]


@dataclass(frozen=True)
class _Model:
    """``nk.step``, with variations that a rule cannot express."""

    rule: Rule
    params: RuleParams
    mask: Callable[..., Array] = _bernoulli  # (key, rate, state.shape, dims) -> [*state, 1 or C]
    alive_before: bool = True
    alive_after: bool = True
    pool: bool = True
    pool_padding: str | None = None  # of the alive pool alone
    residual: bool = True
    has_inputs: bool = False
    inputs_first: bool = False
    changes: tuple[str, ...] = field(default=())

    def step(self, state: Array, key: Any, inputs: Any = None) -> Array:
        rule, dims = self.rule, np.ndim(self.params.perception) - 2
        all_fire = replace(rule, fire_rate=1.0, step_size=1.0, alive=None)
        layers = self.params.layers
        if self.inputs_first:
            (weight, bias), *rest = layers
            size = np.shape(inputs)[-1]
            rows = jnp.concatenate([weight[size:], weight[:size]])
            layers = ((rows, bias), *rest)
        params = replace(self.params, layers=layers)
        run = nk.step(all_fire, params, state, key, inputs, backend="reference")
        update = run - state
        fires = self.mask(key, rule.fire_rate, state.shape, dims)
        new = (state if self.residual else 0) + jnp.where(fires, rule.step_size * update, 0)
        if rule.alive is None:
            return new
        alive = jnp.ones(state.shape[:-1], bool)
        for wanted, cells in ((self.alive_before, state), (self.alive_after, new)):
            alive = alive & self.lives(cells, dims) if wanted else alive
        return jnp.where(alive[..., None], new, 0)

    def lives(self, state: Array, dims: int) -> Array:
        from nca_kernels.backends.reference.plain_step import is_alive

        assert self.rule.alive is not None
        if not self.pool:
            return state[..., self.rule.alive.channel] > self.rule.alive.threshold
        padding = self.pool_padding or self.rule.padding
        return is_alive(replace(self.rule, padding=padding), state, dims)


# ---- what may differ ----


def _explanations(
    model: _Model, probes: Sequence[_Probe], theirs: Sequence[Array], limit: float
) -> str:
    """The changes of one part, or else of two, that make our step theirs; empty if none do."""

    def errors(model: _Model) -> Iterator[float]:
        for probe, out in zip(probes, theirs, strict=True):
            try:
                yield error_ratio(model.step(*probe), out)
            except (ValueError, TypeError):  # the change makes no step: shapes that do not fit
                yield float("inf")

    def same(model: _Model) -> bool:
        return all(ratio <= limit for ratio in errors(model))

    suspects = list(_suspects(model))
    culprits = [suspect for suspect in suspects if same(suspect)]
    if not culprits:  # if two parts differ, changing one should bring the steps closest
        near = sorted(suspects, key=lambda s: sum(errors(s)))[:6]
        culprits = list(islice((s for first in near for s in _suspects(first) if same(s)), 1))
    lines = [" and ".join(s.changes) for s in culprits[:3]]
    return f"It is, if {'; or if '.join(lines)}." if lines else ""


def _suspects(model: _Model) -> Iterator[_Model]:
    """The model with one part changed, in all the ways in which people write that part."""
    for make in (_taps, _network, _masks, _alive_masks):
        for text, changed in make(model):
            yield replace(changed, changes=(*model.changes, text))


def _taps(model: _Model) -> Iterator[tuple[str, _Model]]:
    rule, params = model.rule, model.params
    taps, dims = params.perception, np.ndim(params.perception) - 2
    spatial = tuple(range(dims))

    def perceives(taps: Any) -> _Model:
        return replace(model, params=replace(params, perception=taps))

    yield (
        "the taps are flipped (convolution for cross-correlation)",
        perceives(jnp.flip(taps, spatial)),
    )
    if dims > 1 and len(set(np.shape(taps)[:dims])) == 1:
        yield (
            "the spatial axes of the taps are in reverse order (x for y)",
            perceives(jnp.transpose(taps, (*spatial[::-1], dims, dims + 1))),
        )
    channels = np.shape(params.layers[-1][0])[-1]
    size = np.shape(taps)[-1]
    if np.shape(taps)[-2] == 1 and size > channels > 1:
        order = np.arange(size).reshape(channels, -1).T.ravel()
        name = "the features are in the order f*C + c (filter by filter), not c*F + f"
        (weight, bias), *rest = params.layers
        for rows in (order, np.argsort(order)):
            first = jnp.concatenate([weight[:size][rows], weight[size:]])
            yield name, replace(model, params=replace(params, layers=((first, bias), *rest)))
    centre = np.asarray(taps)[tuple(n // 2 for n in np.shape(taps)[:dims])]
    derivative = (np.abs(centre) < 1e-9).all(0)  # filters without the cell itself
    for scale in (8.0, 4.0, 2.0, 32.0):
        for factor, text in ((scale, f"{scale:g}"), (1 / scale, f"1/{scale:g}")):
            scaled = perceives(jnp.where(derivative, factor * taps, taps))
            yield f"the taps of gradients are multiplied by {text}", scaled
    for padding in PADDINGS:
        if padding != rule.padding:
            there = replace(rule, padding=padding)
            yield f"padding={padding!r}", replace(model, rule=there)
            if rule.alive is not None:
                only = replace(model, rule=there, pool_padding=rule.padding)
                yield f"padding={padding!r} for the perception, not for the alive pool", only


def _network(model: _Model) -> Iterator[tuple[str, _Model]]:
    rule, params = model.rule, model.params
    for name in ACTIVATIONS:
        if name != rule.activation:
            yield f"activation={name!r}", replace(model, rule=replace(rule, activation=name))
        if name != rule.perception_activation:
            there = replace(rule, perception_activation=name)
            yield f"perception_activation={name!r}", replace(model, rule=there)
    if params.perception_bias is not None:
        without = replace(params, perception_bias=None)
        yield "perception_bias=None: theirs is not added", replace(model, params=without)
    layers = tuple(map(tuple, params.layers))
    for i, (weight, bias) in enumerate(layers):
        if bias is not None:
            changed = replace(params, layers=(*layers[:i], (weight, None), *layers[i + 1 :]))
            yield (
                f"the bias of layer {i} is None: theirs is not added",
                replace(model, params=changed),
            )
    none = replace(params, layers=tuple((weight, None) for weight, _ in layers))
    yield "all biases of layers are None: theirs are not added", replace(model, params=none)
    if model.has_inputs:
        yield "the inputs come before the perception", replace(model, inputs_first=True)
    yield (
        "the update is the new state: nothing is added to the old one",
        replace(model, residual=False),
    )


def _masks(model: _Model) -> Iterator[tuple[str, _Model]]:
    rule = model.rule

    def drawn(mask: Callable[..., Array]) -> _Model:
        return replace(model, mask=mask)

    for text, size in (
        ("divided by fire_rate (as by dropout)", rule.step_size / rule.fire_rate),
        ("multiplied by fire_rate", rule.step_size * rule.fire_rate),
        ("subtracted", -rule.step_size),
    ):
        there = replace(rule, step_size=size)
        yield f"the update is {text}: step_size={size:g}", replace(model, rule=there)
    if rule.step_size != 1.0:
        yield "step_size=1.0", replace(model, rule=replace(rule, step_size=1.0))
    if rule.fire_rate == 1.0:
        return
    always = replace(rule, fire_rate=1.0)
    yield "every cell fires: fire_rate=1.0", replace(model, rule=always)
    scaled = replace(always, step_size=rule.step_size * rule.fire_rate)
    yield (
        "every cell takes its expected update: fire_rate=1.0 and step_size * fire_rate",
        replace(model, rule=scaled),
    )
    other = replace(rule, fire_rate=1 - rule.fire_rate)
    yield (
        f"fire_rate={other.fire_rate:g}: theirs is the rate of not firing",
        replace(model, rule=other),
    )
    dropped = replace(other, step_size=rule.step_size / other.fire_rate)
    text = f"fire_rate={other.fire_rate:g} and step_size={dropped.step_size:g}"
    yield f"{text}: theirs is the rate of dropout", replace(model, rule=dropped)
    yield (
        "the mask is the complement: the cells fire that jax.random.bernoulli leaves out",
        drawn(lambda key, rate, shape, dims: ~_bernoulli(key, rate, shape, dims)),
    )
    yield (
        "those cells fire whose uniform number is above 1 - fire_rate",
        drawn(lambda key, rate, shape, dims: jax.random.uniform(key, (*shape[:-1], 1)) > 1 - rate),
    )
    yield (
        "the mask is drawn for each channel, not for each cell",
        drawn(lambda key, rate, shape, dims: jax.random.bernoulli(key, rate, shape)),
    )
    yield (
        "one mask is drawn for all samples: nk.step in jax.vmap with one key",
        drawn(lambda key, rate, shape, dims: _bernoulli(key, rate, shape[-dims - 1 :], dims)),
    )
    for i in range(2):
        yield (
            f"the mask's key is jax.random.split(key)[{i}]",
            drawn(
                lambda key, rate, shape, dims, i=i: _bernoulli(
                    jax.random.split(key)[i], rate, shape, dims
                )
            ),
        )


def _alive_masks(model: _Model) -> Iterator[tuple[str, _Model]]:
    rule = model.rule
    channels = np.shape(model.params.layers[-1][0])[-1]
    if rule.alive is None:
        for channel in range(channels):
            for threshold in (0.1, 0.0, 0.5):
                there = replace(rule, alive=Alive(channel, threshold))
                yield f"alive=nk.Alive({channel}, {threshold})", replace(model, rule=there)
        return
    yield "alive=None: theirs has no alive mask", replace(model, rule=replace(rule, alive=None))
    for channel in range(channels):
        if channel != rule.alive.channel % channels:
            there = replace(rule, alive=replace(rule.alive, channel=channel))
            yield f"the alive channel is {channel}", replace(model, rule=there)
    for threshold in (0.0, 0.1, 0.5):
        there = replace(rule, alive=replace(rule.alive, threshold=threshold))
        yield f"the alive threshold is {threshold}", replace(model, rule=there)
    yield "only the state before the step decides who lives", replace(model, alive_after=False)
    yield "only the state after the step decides who lives", replace(model, alive_before=False)
    yield "a cell's own alive value decides, without its neighbours'", replace(model, pool=False)
    for padding in PADDINGS:
        if padding != rule.padding:
            yield (
                f"the alive pool alone has padding {padding!r}",
                replace(model, pool_padding=padding),
            )


# ---- where they differ ----


def _where(model: _Model, ours: Any, theirs: Any, state: Any) -> str:
    """Where two states differ, if no change of a part explains why."""
    ours, theirs, state = (np.asarray(a, np.float64) for a in (ours, theirs, state))
    dims = np.ndim(model.params.perception) - 2
    off = np.abs(ours - theirs) > 1e-5 * max(np.abs(ours).max(), 1e-30)
    cells = off.any(-1)
    inner = cells[(Ellipsis, *(slice(1, -1),) * dims)]
    facts = [f"{cells.mean():.0%} of the cells differ"]
    if cells.any() and not inner.any():
        facts.append("all of them at the border: look at the padding")
    channels = np.flatnonzero(off.any(tuple(range(off.ndim - 1))))
    if len(channels) < off.shape[-1]:
        facts.append(f"only in channels {', '.join(map(str, channels))}")
    changed = [np.any(out != state, -1) for out in (ours, theirs)]
    if (changed[0] != changed[1]).any():
        facts.append(f"other cells change: {changed[1].sum()} in theirs, {changed[0].sum()} here")
    dead = [~np.any(out, -1) for out in (ours, theirs)]
    if (dead[0] != dead[1]).any():
        facts.append(f"other cells are all 0: {dead[1].sum()} in theirs, {dead[0].sum()} here")
    return (
        "No change of one or two of its parts explains it (taps, padding, activations, biases, "
        f"inputs, mask, alive mask). {'; '.join(facts)}."
    )
