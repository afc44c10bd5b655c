"""Tests of the packages; see CONTRIBUTING.md."""
