"""Surefoot finds out where a PyTorch model breaks, fixes it with published methods, and proves the fix."""

__version__ = "0.1.0"
