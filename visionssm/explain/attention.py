"""One layer's hidden attention: rows, blocks of rows and vector products of a matrix that is never stored whole.

A row alpha[i] is the gradient of the scan's output at token i with respect to what is scanned, dt, B and C held fixed: one
transposed scan, O(L E N) time and O(E L) memory, which is again a scan and as fast as the library's operator on any backend.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from visionssm.errors import UserError, did_you_mean

from .layout import Token, TokenLayout
from .operands import MixerFactors, ScanOperands

Channels = str | int | slice | list[int] | None  # "all", some, or None for the mean over all
INCLUDES = ("ssm", "ssm+skip", "mixer")
_BLOCK_ELEMENTS = 1 << 24  # of one intermediate map (rows, L, E) of a block: 64 MB in float32


@contextlib.contextmanager
def recomputation(like: Tensor) -> Iterator[None]:
    """What is recomputed is neither differentiated nor cast, wherever the caller stands."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


class Attention:
    """The attention matrix of one recorded layer, `(L, L)` for every sample and channel; made by `Tape.attention`.

    The element (i, j) says how much token i reads of token j. It is signed, and rows need not sum to 1. In image order, the
    directions summed; `direction` selects one. Results are averaged over the channels unless asked otherwise.

    What is part of the matrix, see `include`: "ssm" is alpha alone; "ssm+skip" is alpha + D I; "mixer" goes from what in_proj
    gives to the scan to what out_proj receives, diag(left) (alpha + D I) diag(sigmoid(c)) T, with the convolution T, SiLU as the
    factor sigmoid(c) of its output c, and on the left the gate, the weights of the directions (BiAttn, Vim's half) and the
    scale of the norm. The centring of that LayerNorm, which mixes channels and not tokens, stays outside. Window paths that pad
    the grid before the convolution (LocalVim) also read their padded steps: in "mixer" these belong to the tokens whose
    convolution filled them, in the other two they are left out.

    Args:
        operands: the scans.
        layout: of the tokens.
        factors: gives the factors around the scans, which it makes on its first call; None if there are none.
        include: see above.
    """

    def __init__(
        self,
        operands: ScanOperands,
        layout: TokenLayout,
        factors: Callable[[], MixerFactors] | None = None,
        include: str = "ssm",
    ) -> None:
        self.layout = layout
        self._operands = operands
        self._factors = factors
        self._include = include

    def __repr__(self) -> str:
        height, width = self.layout.grid
        return (
            f"Attention({self.batch} x {self.channels} channels, {self.layout.tokens} tokens on {height} x {width}, "
            f"paths {', '.join(self.paths)}, include={self._include!r})"
        )

    @property
    def batch(self) -> int:
        """Samples."""
        return self._operands.x_dbl.shape[0]

    @property
    def channels(self) -> int:
        """E."""
        return self._operands.A.shape[1]

    @property
    def paths(self) -> tuple[str, ...]:
        """The names of the summed directions."""
        return self._operands.paths.names

    @property
    def dtype(self) -> torch.dtype:
        """Of all results: float64 for a model in float64, else float32."""
        return self._operands.A.dtype

    def weights(self, token: Token) -> Tensor:
        """The weights of the rows, `(L,)`, that select `token`, see `rows`."""
        return self.layout.weights(token, self._operands.A)

    def without_decay_at(self, token: Token) -> Attention:
        """The same with a step of 0 at one token, which then neither decays what others wrote nor writes: published.py alone."""
        position = int(self.weights(token).argmax())
        with recomputation(self._operands.A):
            return Attention(self._operands.without_decay_at(position), self.layout)

    def include(self, what: str) -> Attention:
        """The same with "ssm", "ssm+skip" or the whole "mixer" in the matrix.

        Raises:
            UserError: another word, or "mixer" where only a scan is known.
        """
        if what not in INCLUDES:
            raise UserError(f"include: got {what!r}, expected one of {', '.join(INCLUDES)}{did_you_mean(str(what), INCLUDES)}")
        if what == "mixer" and self._factors is None:
            raise UserError("include: 'mixer' needs a recorded mixer, and this is a scan alone")
        return Attention(self._operands, self.layout, self._factors, what)

    def direction(self, which: int | str) -> Attention:
        """One path alone, in image order.

        Args:
            which: the index of the path, its name, or "forward" and "backward" in Vim.

        Raises:
            UserError: no such path, or a name that occurs twice.
        """
        k = self._path_index(which)
        one, factors = slice(k, k + 1), self._factors
        operands = self._operands.some(one)
        around = None if factors is None else functools.cache(lambda: factors().some(one, operands))
        return Attention(operands, self.layout, around, self._include)

    def rows(self, tokens: Token | list[Token], channels: Channels = None) -> Tensor:
        """What tokens read.

        Args:
            tokens: "cls", "mean" (the mean of the rows of all grid tokens), an index, (row, column), or a list of these.
            channels: None for the mean over the channels; "all", an index, a slice or a list for these channels apart.

        Returns:
            `(batch, [tokens,] [channels,] L)`: an axis for tokens where a list was given, for channels where not None.

        Raises:
            UserError: a token or channel that is not there.
        """
        several = isinstance(tokens, list)
        if several and not tokens:
            raise UserError("tokens: got an empty list, expected at least one")
        weights = torch.stack([self.weights(token) for token in (tokens if several else [tokens])])
        rows = torch.cat(list(self._blocks(weights, channels, None)), dim=1)
        return rows if several else rows.squeeze(1)

    def matrix(self, block: int | None = None, channels: Channels = None) -> Tensor:
        """The explicit matrix, computed `block` rows at a time.

        Args:
            block: rows at once; None for as many as keep an intermediate map within 2^24 elements.
            channels: as in `rows`.

        Returns:
            `(batch, L, [channels,] L)`.
        """
        return torch.cat(list(self.blocks(block, channels)), dim=1)

    def blocks(self, block: int | None = None, channels: Channels = None) -> Iterator[Tensor]:
        """The rows of `matrix`, `block` at a time: `(batch, block, [channels,] L)`; the last block may be shorter."""
        if block is not None and (type(block) is not int or block < 1):
            raise UserError(f"block: got {block!r}, expected a number of rows from 1")
        return self._blocks(range(self.layout.tokens), channels, block)

    def vector_product(self, vector: Tensor) -> Tensor:
        """`vector` times the matrix averaged over the channels: one transposed scan.

        Args:
            vector: `(batch, L)`, the weight of every row.

        Returns:
            `(batch, L)`.

        Raises:
            UserError: another shape.
        """
        if vector.shape != (self.batch, self.layout.tokens):
            raise UserError(f"vector: got {tuple(vector.shape)}, expected (batch, L) = {(self.batch, self.layout.tokens)}")
        return self._pull(vector.to(self._operands.A.dtype).unsqueeze(1), None).squeeze(1)

    def apply(self, v: Tensor) -> Tensor:
        """The matrix of every channel times `v`, `(batch, L, E)` to the same: one scan."""
        if v.shape != (self.batch, self.layout.tokens, self.channels):
            expected = (self.batch, self.layout.tokens, self.channels)
            raise UserError(f"v: got {tuple(v.shape)}, expected (batch, L, E) = {expected}")
        operands, v = self._operands, v.to(self._operands.A.dtype)
        with recomputation(operands.A):
            if self._include == "mixer":
                factors = self._factors()
                return factors.left * operands.scan(factors.before(operands.read(v)), skip=True, merge=True)
            return operands.scan(operands.read(v), skip=self._include == "ssm+skip", merge=True)

    def magnitude(self) -> Attention:
        """The matrix with |B|, |C| and |D|: the magnitudes of the elements, per path and channel, where the scan has one state.

        With more states an upper bound of them, since the terms of an element may have different signs.

        Raises:
            UserError: for "mixer".
        """
        if self._include == "mixer":
            raise UserError('magnitude: include "mixer" has no cheap one; expected include "ssm" or "ssm+skip"')
        return Attention(self._operands.absolute(), self.layout, None, self._include)

    def row_bound(self) -> Tensor:
        """An upper bound of the sum of magnitudes of every row of the channel-mean matrix, `(batch, L)`: one scan.

        The row sums of `magnitude`: unlike sums of signed elements, never near 0 for a row that is not.

        Raises:
            UserError: for "mixer".
        """
        if self._include == "mixer":
            raise UserError('normalize: rows of include "mixer" have no cheap bound; pass normalize=False, or include "ssm"')
        ones = self._operands.A.new_ones(self.batch, self.layout.tokens, self.channels)
        return self.magnitude().apply(ones).mean(-1)

    def to_map(self, rows: Tensor) -> Tensor:
        """Rows `(..., L)` on the grid, `(..., rows, columns)`; a class token is dropped."""
        if rows.shape[-1] != self.layout.tokens:
            raise UserError(f"rows: got {tuple(rows.shape)}, expected L = {self.layout.tokens} in the last place")
        return self.layout.to_map(rows)

    def _path_index(self, which: int | str) -> int:
        names = self.paths
        if isinstance(which, int) and not isinstance(which, bool):
            if not 0 <= which < len(names):
                raise UserError(f"direction: got {which}, expected an index from 0 to {len(names) - 1} ({', '.join(names)})")
            return which
        aliases = {"forward": 0, "backward": 1} if names == ("h", "h_flip") and self._operands.paths.size[0] == 1 else {}
        if isinstance(which, str) and which in aliases:
            return aliases[which]
        if not isinstance(which, str) or names.count(which) != 1:
            what = "occurs more than once, give its index" if which in names else "is none of"
            known = [*names, *aliases]
            raise UserError(f"direction: {which!r} {what}: {', '.join(known)}{did_you_mean(str(which), known)}")
        return names.index(which)

    def _blocks(self, rows: Tensor | range, channels: Channels, block: int | None) -> Iterator[Tensor]:
        """Weights of rows, (rows, L), or the rows of these tokens, times the matrix, a few rows at a time."""
        chosen = self._channel_index(channels)
        block = block or max(1, _BLOCK_ELEMENTS // (self.batch * self.layout.tokens * self.channels))
        for first in range(0, len(rows), block):
            part = rows[first : first + block]
            if isinstance(part, range):
                part = torch.zeros(len(part), self.layout.tokens, dtype=self.dtype, device=self._operands.A.device)
                part.diagonal(first).fill_(1.0)
            yield self._pull(part.expand(self.batch, -1, -1), chosen)

    def _pull(self, weights: Tensor, channels: Tensor | None) -> Tensor:
        """Weights of rows `(batch, R, L)` -> their product with the matrix, `(batch, R, [channels,] L)`."""
        batch, count, tokens = weights.shape
        cotangent = weights.reshape(batch * count, tokens, 1).expand(-1, -1, self.channels)

        def chosen(maps: Tensor) -> Tensor:
            return maps.mean(-1, keepdim=True) if channels is None else maps.index_select(-1, channels)

        # Each path's steps are as large as the cotangent.
        at_once, total = max(1, _BLOCK_ELEMENTS // cotangent.numel()), 0.0
        with recomputation(self._operands.A):
            factors = self._factors() if self._include == "mixer" else None
            if factors is not None:
                cotangent = (factors.left.unsqueeze(1) * weights.unsqueeze(-1)).flatten(0, 1)
            for first in range(0, len(self.paths), at_once):
                some = slice(first, first + at_once)
                operands = self._operands.some(some)
                steps = operands.scan_transposed(cotangent, skip=self._include != "ssm")
                if factors is not None:
                    steps = factors.some(some, operands).before_transposed(steps)
                total = total + operands.put_back(chosen(steps))
        total = total.squeeze(-1) if channels is None else total.mT
        return total.unflatten(0, (batch, count))

    def _channel_index(self, channels: Channels) -> Tensor | None:
        if channels is None:
            return None
        every = range(self.channels)
        if isinstance(channels, str):
            wanted = list(every) if channels == "all" else []
        elif isinstance(channels, slice):
            wanted = list(every[channels])
        else:
            wanted = channels if isinstance(channels, list) else [channels]
        if not wanted or not all(type(c) is int and c in every for c in wanted):
            raise UserError(f'channels: got {channels!r}, expected None, "all", a slice or indices from 0 to {self.channels - 1}')
        return torch.tensor(wanted, device=self._operands.A.device)
