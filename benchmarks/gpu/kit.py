"""A kit for a machine with a GPU: kernels that it need not compile, and packages that it lacks.

``python -m benchmarks.gpu.kit --out DIR`` (``make gpu-kit``) runs on a machine without a GPU that
has the same versions of Python and Triton. It compiles every Triton kernel of ``benchmarks.gpu``,
packs Triton's cache of them, and adds wheels of packages that the other machine lacks. When it was
interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.items import Asked, Facts, Refused, listed
from benchmarks.gpu.results import RunResults
from benchmarks.gpu.runner import Course, Machinery, Stage
from benchmarks.gpu.stages import STAGES
from benchmarks.measure import commit
from nca_kernels.backends.triton.device import ARCHITECTURE
from nca_kernels.files import write_json

PACKAGES = ("tensorboardX",)  # that training may import, and that machines with JAX often lack
MEGABYTES = 60
ARCHIVE, DESCRIPTION = "triton.zip", "kit.json"
KEPT = (".json", ".ptx", ".cubin")  # what Triton reads of a kernel, and what JAX is handed
GROUP = "__grp__"  # how files that list a kernel's others begin
PLATFORMS = ("2_28", "2_27", "2_17")  # manylinux


# ---- using one ----


def versions() -> dict[str, str]:
    """The versions that kernels and wheels depend on."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), "triton": _version("triton")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def unfit(folder: Path) -> str | None:
    """Why a kit cannot be used on this machine, or None."""
    try:
        made_for = json.loads((folder / DESCRIPTION).read_text())["versions"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder} is none ({error})"
    here = versions()
    different = [name for name in here if made_for.get(name) != here[name]]
    if not different:
        return None
    pairs = [f"{name} {made_for.get(name)} (here is {here[name]})" for name in different]
    return f"it was made for {', '.join(pairs)}"


def unpack(folder: Path, scratch: Path) -> dict[str, str]:
    """Copies a kit to a folder that can be written; returns the environment that uses it.

    Raises:
        OSError, zipfile.BadZipFile: it is broken.
    """
    cache, wheels = scratch / "triton", scratch / "wheels"
    cache.mkdir()
    if (folder / ARCHIVE).exists():
        zipfile.ZipFile(folder / ARCHIVE).extractall(cache)
        relocate(cache)
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(wheels)
    path = os.pathsep.join(filter(None, (str(wheels), os.environ.get("PYTHONPATH", ""))))
    return {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}


def relocate(cache: Path) -> None:
    """Makes the lists of files in a cache name the files that are there, by their present paths."""
    for path in cache.glob(f"*/{GROUP}*"):
        files = {file.name: str(file) for file in sorted(path.parent.iterdir()) if file != path}
        path.write_text(json.dumps({"child_paths": files}))


# ---- making one ----


def make(options: argparse.Namespace) -> int:
    """Makes a kit, and says what is in it."""
    making = options.out.with_name(f"{options.out.name}.making")
    (making / "triton").mkdir(parents=True, exist_ok=True)
    results = RunResults(making / sources(options), {}, lambda _: None)
    for key in [key for key, record in results.records.items() if "error" in record]:
        del results.records[key]
    wheels = fetch_wheels(options.packages, options.out / "wheels")
    compile_kernels(options, results, making / "triton")
    folders = {f for r in results.records.values() for f in r.get("kernels", {}).get("folders", ())}
    for folder in (making / "triton").iterdir():
        if folder.name not in folders:  # of other sources
            shutil.rmtree(folder)
    pack(making / "triton", options.out / ARCHIVE)
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file()) / 1e6
    about = {"commit": commit(), "versions": versions(), "arch": options.arch}
    counts = {"kernels": len(folders), "items": len(results.records), "wheels": wheels}
    write_json(options.out / DESCRIPTION, {**about, **counts, "megabytes": round(size, 1)})
    failed = results.failed()
    print(
        f"{options.out}: {len(folders)} kernels of {len(results.records)} items, "
        f"{len(wheels)} wheels, {size:.1f} MB"
    )
    for record in failed:
        print(f"not compiled: {record['stage']}: {record['item']}: {record['error'][:300]}")
    if size > MEGABYTES:
        print(f"it is larger than {MEGABYTES} MB", file=sys.stderr)
    return int(bool(failed) or size > MEGABYTES)


def sources(options: argparse.Namespace) -> str:
    """A name that changes with the sources of the kernels, and with what they are compiled for."""
    root = Path(__file__).parents[2]
    folders = ("nca_kernels", "benchmarks", "tests/tools")
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    target = (options.arch, options.device, options.tiny, versions())
    digest = hashlib.sha256(repr(target).encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compile_kernels(options: argparse.Namespace, results: RunResults, cache: Path) -> None:
    """Compiles kernels in child processes into Triton's cache; ``results`` record which."""
    from tqdm import tqdm

    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        ARCHITECTURE: str(options.arch),
        "TRITON_CACHE_DIR": str(cache),
        # What runs on the CPU meanwhile, such as an oracle, is not used, and is compiled fast.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    environment.pop("TRITON_INTERPRET", None)  # nothing compiles with it
    with tqdm(total=0, disable=None, unit="item") as bar:

        def begun(items: int) -> None:
            bar.total += items
            bar.refresh()

        def told(record: Facts) -> str:
            bar.update()
            return report.line(record) if "error" in record else ""

        Course(
            stages={
                name: Stage(math.inf, 600.0, options.jobs)
                for name in listed(options.stages, STAGES)
            },
            asked=Asked(("triton",), options.tiny, any_device=True, device=options.device),
            results=results,
            machinery=Machinery(
                (sys.executable, "-m", "benchmarks.gpu.rehearsal"),
                environment,
                verb="lower",
                say=lambda line: bar.write(line, file=sys.stderr),
            ),
            end=math.inf,
            only=options.items,
            told=told,
            begun=begun,
        ).run()


def pack(cache: Path, archive: Path) -> None:
    """Packs what kernels are loaded from into one file, which is whole or absent."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial_archive = archive.with_suffix(".part")
    with zipfile.ZipFile(partial_archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path in sorted(cache.glob("*/*")):
            if path.is_file() and path.suffix in KEPT:
                packed.write(path, path.relative_to(cache))
    partial_archive.replace(archive)


def fetch_wheels(packages: Sequence[str], folder: Path) -> list[str]:
    """Fetches wheels for this Python on Linux, of the installed versions if there are any.

    Raises:
        Refused: pip cannot get them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.glob("*.whl"):
        other.unlink()
    installed = {name: _version(name) for name in packages}
    named = [name if v == "none" else f"{name}=={v}" for name, v in installed.items()]
    if named:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
        command += ["--python-version", versions()["python"], "--implementation", "cp"]
        for tag in PLATFORMS:
            command += ["--platform", f"manylinux_{tag}_x86_64"]
        run = subprocess.run([*command, *named], capture_output=True, text=True)
        if run.returncode:
            last = run.stderr.strip().splitlines()[-1:]
            raise Refused(
                f"no wheels of {', '.join(named)}: {''.join(last)}; --packages names them"
            )
    return sorted(path.name for path in folder.glob("*.whl"))


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.kit", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--arch", type=int, default=90, help="the CUDA compute capability, as 90 (an H200)")
    add("--device", default="", help="as JAX names it, if launches have been packaged for it")
    add("--stages", default=",".join(STAGES), help="what a run will go through")
    add("--items", default="", metavar="TEXT", help="only those whose names contain it")
    add("--packages", nargs="*", default=list(PACKAGES), help="whose wheels go with it")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    add("--tiny", action="store_true", help="tiny sizes, to try the command itself")
    try:
        return make(parser.parse_args())
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
