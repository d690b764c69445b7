"""The Triton backend. Importing this loads Triton; nothing imports it before the first call that needs it."""

from .launch import backward, forward, states_shape

__all__ = ["backward", "forward", "states_shape"]
