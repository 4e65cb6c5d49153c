"""Packaged experiment files."""
