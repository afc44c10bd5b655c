"""Targets: image files, emoji, and the picture that ships with the package."""
