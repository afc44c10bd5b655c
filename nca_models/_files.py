"""Files that are either whole or absent, whenever the process is killed.

Not ``nca_kernels.files``: the command line refuses wrong input before JAX starts, which importing
``nca_kernels`` does.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
