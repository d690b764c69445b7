"""The Triton backend. Importing this loads Triton; nothing imports it before the first call that needs it."""

from .launch import backward, forward, sequence_backward, sequence_forward, states_shape

__all__ = ["backward", "forward", "sequence_backward", "sequence_forward", "states_shape"]
