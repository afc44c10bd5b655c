"""Tests; the folders are those of what is tested. See CONTRIBUTING.md."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
