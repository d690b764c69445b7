"""Where the tokens of a layer lie: a grid of patches in raster order, with or without a class token among them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from visionssm.errors import UserError

Token = str | int | tuple[int, int]
"""A token to explain: "cls", "mean" (all tokens of the grid), an index, or (row, column) on the grid."""


@dataclass(frozen=True)
class TokenLayout:
    """`grid` (rows, columns), and the index of the class token in the sequence, or None."""

    grid: tuple[int, int]
    class_index: int | None = None

    @property
    def tokens(self) -> int:
        """L, the class token included."""
        return self.grid[0] * self.grid[1] + (self.class_index is not None)

    def weights(self, token: Token, like: Tensor) -> Tensor:
        """The row `(L,)` of weights that selects `token`, with the dtype and device of `like`.

        Raises:
            UserError: a token that is not there.
        """
        weights = torch.zeros(self.tokens, dtype=like.dtype, device=like.device)
        if token == "mean":
            weights.fill_(1 / (self.grid[0] * self.grid[1]))
            if self.class_index is not None:
                weights[self.class_index] = 0.0
        else:
            weights[self._index(token)] = 1.0
        return weights

    def to_map(self, rows: Tensor) -> Tensor:
        """`(..., L)` -> `(..., rows, columns)`, without the class token."""
        if self.class_index is not None:
            rows = torch.cat([rows[..., : self.class_index], rows[..., self.class_index + 1 :]], dim=-1)
        return rows.unflatten(-1, self.grid)

    def _index(self, token: Token) -> int:
        height, width = self.grid
        if token == "cls":
            if self.class_index is None:
                raise UserError('token: "cls", but the model has no class token; expected "mean" or (row, column)')
            return self.class_index
        if isinstance(token, int) and not isinstance(token, bool):
            if not 0 <= token < self.tokens:
                raise UserError(f"token: got {token}, expected an index from 0 to {self.tokens - 1}")
            return token
        if not (isinstance(token, tuple) and len(token) == 2 and all(type(i) is int for i in token)):
            raise UserError(f'token: got {token!r}, expected "cls", "mean", an index or (row, column)')
        row, column = token
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(f"token: got {token}, outside of the {height} x {width} grid")
        index = row * width + column
        return index + (self.class_index is not None and index >= self.class_index)
