"""Files that are written whole or not at all, whenever the process is killed, and pipes.

Not ``nca_kernels.files``: the command line refuses wrong input before JAX starts, which importing
``nca_kernels`` does.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LARGEST_PIPED = 1 << 28

# What can go wrong with files that are written and read.
_NUMBERS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it to `path` if the block succeeds.

    The temporary name keeps the suffix, from which image writers choose the format.

    Raises:
        OSError: the folder is missing, full or cannot be written to; `filename` is `path`.
    """
    temporary = None
    try:
        prefix = f".{path.stem[:40]}-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        # The pipe that breaks here is one to an encoder, not this process's standard output.
        number = errno.EIO if isinstance(error, BrokenPipeError) else error.errno
        raise OSError(number, reason(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """Say in a few words why something could not be read or written.

    Those are the operating system's words if they are anywhere in the error's text, which for the
    libraries that write checkpoints and films is long, else the start of that text.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    words = (os.strerror(number) for number in _NUMBERS)
    return next((phrase for phrase in words if phrase in text), text[:200] or type(error).__name__)


def is_pipe(path: Path) -> bool:
    """Tell whether `path` is a pipe, as `<(command)` of a shell and /dev/stdin can be."""
    try:
        return path.is_fifo()
    except OSError:
        return False


@cache
def piped(path: Path) -> bytes:
    """Return what comes out of a pipe, of which a process can read it only once.

    Raises:
        OSError: the pipe cannot be read, or more than `LARGEST_PIPED` bytes come out of it.
    """
    with path.open("rb") as pipe:
        content = pipe.read(LARGEST_PIPED + 1)
    if len(content) > LARGEST_PIPED:
        raise OSError(errno.EFBIG, f"more than {LARGEST_PIPED >> 20} MiB come out of it", str(path))
    return content


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
