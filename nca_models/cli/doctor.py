"""`nca doctor`: versions, devices and backends."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from nca_models.cli.common import Commands

_PACKAGES = ("nca-kernels", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
_OPTIONAL = ("imageio-ffmpeg", "tensorboardX", "triton")


def add(commands: Commands) -> None:
    """Add the command."""
    doctor = commands.add_parser("doctor", help="show versions, devices and backends")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    import jax

    import nca_kernels as nk

    print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    print("\npackages")
    for name in _PACKAGES + _OPTIONAL:
        print(f"  {name:18} {_version(name)}")
    print(f"\ndevices, the default one being {jax.default_backend()}")
    for device in jax.devices():
        print(f"  {device}  {device.device_kind}")
    rows = nk.backends()
    print("\nbackends")
    for row in rows:
        print(f"  {row.name:10} {'available' if row.available else 'no: ' + row.reason}")
    chosen = [row.name for row in rows if row.auto]
    print(f'\n"auto" picks: {", ".join(chosen) or "nothing"}')
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
