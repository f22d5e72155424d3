"""An experiment is data: profile x arm x protocol x seed -> a run with a stable id. Never imports torch."""

from .profile import load_profile

__all__ = ["load_profile"]
