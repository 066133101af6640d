"""Shipworthy takes a trained model to production and keeps it trustworthy there."""

from importlib.metadata import version

__version__ = version("shipworthy")
