"""Files that are either whole or absent, whenever the process is killed."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` in UTF-8; a reader sees the old file or the new one. The folder is made.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid4().hex}")  # nobody else's, on any machine
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, sort_keys: bool = False) -> None:
    """Writes ``content``, indented, as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=1, sort_keys=sort_keys) + "\n")
