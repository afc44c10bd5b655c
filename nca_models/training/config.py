"""The settings of a training, as dataclasses: what the systems' own settings are built on.

A setting that says its `flag` is an option of `nca train`, and every setting is one of `nca sweep`;
its `help` is what the options show.
Nothing heavy is imported here, so that the command line knows all settings before JAX starts.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar


def setting(
    default: Any = MISSING,
    *,
    lowest: int = 1,
    help: str = "",
    flag: str | None = None,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    short: str | None = None,
) -> Any:
    """Declare a setting.

    Args:
        default: its value in presets that do not give one.
        lowest: its lowest value, if it is an integer. Options take other numbers above 0, and with
            0 here they take 0 as well.
        help: what it is, in a phrase.
        flag: the option of `nca train` that sets it, as in `--steps`; None for no option.
        metavar: what the help shows for the option's value (default: N for int, X for float).
        choices: the values that the option takes; None for all.
        short: its name in the names of a sweep's runs; the sweep's table then always shows it.
    """
    metadata = {"lowest": lowest, "help": help, "flag": flag, "metavar": metavar}
    return field(default=default, metadata=metadata | {"choices": choices, "short": short})


def option(setting: Field[Any]) -> str:
    """Return the name of a setting's option: its flag, or else its name, as in `--fire-rate`."""
    return setting.metadata.get("flag") or "--" + setting.name.replace("_", "-")


def type_name(setting: Field[Any]) -> str:
    """Return the name of a setting's type, without `| None`."""
    return _annotation(setting).removesuffix(" | None")


def optional(setting: Field[Any]) -> bool:
    """Tell whether None is a value of the setting."""
    return _annotation(setting).endswith(" | None")


def _annotation(setting: Field[Any]) -> str:
    return setting.type.__name__ if isinstance(setting.type, type) else str(setting.type)


def _require_type(setting: Field[Any], value: Any) -> None:
    """Refuse (ValueError) a value that is not of the setting's type, if it is one of these."""
    if value is None and optional(setting):
        return
    kinds = {"int": (Integral, "a whole number"), "float": (Real, "a finite number")}
    kind, words = (kinds | {"str": (str, "a text")}).get(type_name(setting), (object, ""))
    fits = isinstance(value, kind) and not (isinstance(value, bool) and words)
    if not fits or (kind is Real and not math.isfinite(value)):
        raise ValueError(f"{setting.name} is {value!r}, but must be {words}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that every system has, and what a system's settings tell the command `nca`.

    Attributes:
        target_help: what `nca train SYSTEM --target` may name; "" if the system takes no target.
        target_name, default_target: how a sweep's table names the column of targets, and what
            stands in it where no target is named.
        examples: lines for the help of `nca train`.
        commands: commands that take this system only.
    """

    target_help: ClassVar[str] = ""
    target_name: ClassVar[str] = "target"
    default_target: ClassVar[str | None] = None
    examples: ClassVar[tuple[str, ...]] = ()
    commands: ClassVar[tuple[str, ...]] = ()

    num_train_steps: int = setting(flag="--steps", help="training steps")
    batch_size: int = setting(flag="--batch-size", help="samples in a training step")
    pool_size: int = setting(
        lowest=0,
        flag="--pool-size",
        help="samples kept between training steps; with 0 every batch is fresh, and neither "
        "restarts nor damages apply",
    )
    learning_rate: float = setting(flag="--learning-rate", help="Adam's learning rate at the start")
    final_learning_rate: float = setting(
        help="reached linearly after `decay_steps` training steps, and then kept"
    )
    decay_steps: int | None = setting(
        None, help="training steps until the learning rate is the final one; None: all of them"
    )
    clip_norm: float = setting(1.0, help="largest global norm of the gradient")
    gradients: str = setting(
        "clipped",
        choices=("clipped", "normalized"),
        help="clipped at `clip_norm`; or normalized, which gives each parameter's gradient norm 1",
    )
    restarts_per_batch: int = setting(
        1,
        flag="--restarts-per-batch",
        help="how many of a batch's worst samples may give way to fresh ones",
    )
    restart_rate: float = setting(
        1.0,
        help="probability that each of them does; samples of a pool grow older with a lower one",
    )
    final_restart_rate: float | None = setting(
        None, help="`restart_rate` at the end of the training, reached linearly; None: the same"
    )
    restarts_fall_after: float = setting(
        0.0,
        lowest=0,
        help="share of the training after which `restart_rate` begins to fall, 0 to below 1",
    )
    damaged_per_batch: int = setting(
        0,
        lowest=0,
        flag="--damaged-per-batch",
        help="how many of a batch's best samples are damaged before a training step",
    )
    checkpoint_every: int = setting(
        500, flag="--checkpoint-every", help="training steps between checkpoints"
    )
    seed: int = setting(0, lowest=0, flag="--seed", help="seed of all random numbers (default: 0)")
    backend: str = setting(
        "auto",
        flag="--backend",
        metavar="NAME",
        help="backend of nca_kernels; see `nca doctor` (default: auto)",
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with (ValueError)."""
        for each in fields(self):
            value = getattr(self, each.name)
            _require_type(each, value)
            lowest = each.metadata.get("lowest", 1)
            if type_name(each) == "int" and value is not None and value < lowest:
                raise ValueError(f"{each.name} is {value}, but must be at least {lowest}")
            choices = each.metadata.get("choices") or (value,)
            if value not in choices:
                names = ", ".join(choices)
                raise ValueError(f"{each.name} is {value!r}, but must be one of {names}")
        if self.learning_rate <= 0 or self.final_learning_rate <= 0:
            raise ValueError("learning_rate and final_learning_rate must be above 0")
        for name in ("restart_rate", "final_restart_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 1:
                raise ValueError(f"{name} is {rate}, but must be above 0, and 1 at most")
        if self.pool_size and self.pool_size < self.batch_size:
            raise ValueError(
                f"pool_size is {self.pool_size}, but must be 0 or at least batch_size "
                f"({self.batch_size})"
            )
        if not 0 <= self.restarts_fall_after < 1:
            raise ValueError(
                f"restarts_fall_after is {self.restarts_fall_after}, but must be at least 0, and "
                "below 1"
            )
        replaced = self.damaged_per_batch + self.restarts_per_batch
        if self.pool_size and replaced > self.batch_size:
            raise ValueError(
                f"damaged_per_batch is {self.damaged_per_batch} and restarts_per_batch "
                f"{self.restarts_per_batch}: together more than batch_size ({self.batch_size}); "
                "lower one of the two, or raise batch_size"
            )

    @classmethod
    def check_target(cls, system: str, target: str) -> None:
        """Refuse a target that cannot be had (ValueError), before anything heavy is imported.

        `system` is the system's name, for the message. What needs the network is left for later.
        """
        raise ValueError(f"--target {target}: {system} takes no target; leave it out")


@dataclass(frozen=True, kw_only=True)
class SampledStepsConfig(TrainConfig):
    """Settings of a system whose loss takes each sample's state after a random number of steps."""

    num_steps: int = setting(help="steps of the automaton in a training step")
    min_steps: int = setting(help="the least of the random numbers; the largest is `num_steps`")

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with (ValueError)."""
        super().__post_init__()
        if self.min_steps > self.num_steps:
            raise ValueError(f"min_steps is {self.min_steps}, above num_steps ({self.num_steps})")


def target_side(lowest: int = 1) -> Any:
    """Declare the setting `target_size`, which many systems have."""
    return setting(
        lowest=lowest, flag="--size", help="side of the picture, digit or texture, in cells"
    )


def dropout_rate() -> Any:
    """Declare the setting `fire_rate` of a rule whose updates are scaled by its inverse."""
    return setting(
        0.5, help="probability that a cell updates in a step; updates are scaled by its inverse"
    )


def life_threshold(channel: str, note: str = "") -> Any:
    """Declare the setting `alive_threshold`, for a system whose cells live by this channel."""
    return setting(
        0.1, help=f"least {channel}, among a cell and its neighbours, for the cell to live{note}"
    )
