"""Properties of the scan paths and of the scans along them, for any map, path names and inserted token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionssm.ops import BIDIRECTIONAL, CROSS, LOCAL, ScanPaths, cross_merge, cross_scan, cross_selective_scan, selective_scan
from visionssm.ops.paths import path_length, path_table
from visionssm.ops.testing import cross_selective_scan_inputs, selective_scan_inputs

FEW = settings(max_examples=25, deadline=None, derandomize=True)
MANY = settings(max_examples=150, deadline=None, derandomize=True)

sides = st.integers(1, 12)
words = st.one_of(st.sampled_from(["h", "v"]), st.integers(1, 9).map(lambda k: f"w{k}"))
names = st.builds(lambda word, flip: word + flip, words, st.sampled_from(["", "_flip"]))


@st.composite
def scan_paths(draw, max_side=12, token=True):
    size = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    paths = tuple(draw(st.lists(names, min_size=1, max_size=4)))
    return ScanPaths(paths, size, draw(st.none() | st.integers(0, size[0] * size[1])) if token else None)


def flip(name):
    return name.removesuffix("_flip") if name.endswith("_flip") else f"{name}_flip"


# --- tables -----------------------------------------------------------------------------------------------------------


@MANY
@given(scan_paths())
def test_every_position_is_visited_exactly_once(paths):
    assert paths.table.shape == (len(paths), paths.length)
    for steps, inverse, length in zip(paths.table, paths.inverse, paths.lengths, strict=True):
        assert sorted(steps[steps >= 0]) == list(range(paths.positions))
        np.testing.assert_array_equal(steps[inverse], np.arange(paths.positions))
        assert (steps[length:] == -1).all()


@MANY
@given(scan_paths(token=False))
def test_a_flip_is_the_reverse_with_its_padding(paths):
    for name, length in zip(paths.names, paths.lengths, strict=True):
        steps = path_table(name, *paths.size)
        assert len(steps) == length == path_length(name, *paths.size)
        np.testing.assert_array_equal(path_table(flip(name), *paths.size), steps[::-1])


@MANY
@given(scan_paths())
def test_an_inserted_token_keeps_its_index(paths):
    """It is step `token_at` of every path and raster position `token_at`; the other steps keep their order."""
    if paths.token_at is None:
        return
    plain = ScanPaths(paths.names, paths.size)
    assert (paths.table[:, paths.token_at] == paths.token_at).all()
    assert (paths.inverse[:, paths.token_at] == paths.token_at).all()
    others = np.delete(paths.table, paths.token_at, axis=1)
    np.testing.assert_array_equal(others - (others > paths.token_at), plain.table)


@MANY
@given(sides, sides)
def test_words(height, width):
    """h is raster order, v the raster order of the transposed map, w1 is h, one window over the whole map is h with padding."""
    raster = np.arange(height * width)
    np.testing.assert_array_equal(path_table("h", height, width), raster)
    np.testing.assert_array_equal(path_table("w1", height, width), raster)
    transposed = path_table("v", height, width)
    np.testing.assert_array_equal(transposed % width * height + transposed // width, raster)
    whole = path_table(f"w{max(height, width)}", height, width)
    np.testing.assert_array_equal(whole[whole >= 0], raster)


@MANY
@given(sides, sides, st.integers(2, 9))
def test_windows_stay_together(height, width, k):
    """Any K * K steps of wK in a row from a multiple of K * K lie in one K x K window, in raster order."""
    for window in path_table(f"w{k}", height, width).reshape(-1, k * k):
        visited = window[window >= 0]
        rows, columns = visited // width, visited % width
        assert len({*zip(rows // k, columns // k, strict=True)}) == 1
        assert (np.diff(visited) > 0).all()


def test_exported_path_sets():
    """The orders that weights are bound to."""
    assert CROSS == ("h", "v", "h_flip", "v_flip")
    assert BIDIRECTIONAL == ("h", "h_flip")
    assert LOCAL == ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")


def test_tables_are_shared_and_read_only():
    paths = ScanPaths(CROSS, (3, 4))
    assert paths.table is ScanPaths(CROSS, (3, 4)).table
    for table in (paths.table, paths.inverse, path_table("v", 3, 4)):
        with pytest.raises(ValueError, match="read-only"):
            table[..., 0] = 7


# --- cross_scan and cross_merge ---------------------------------------------------------------------------------------


@FEW
@given(scan_paths(max_side=8))
def test_merge_undoes_scan(paths):
    """Each path's way back is its inverse; summed, the map comes back K times."""
    x = torch.randn(2, paths.positions, 3, dtype=torch.float64)
    sequences = cross_scan(x, paths)
    apart = cross_merge(sequences, paths, merge=False)
    assert apart.shape[:2] == (2, len(paths))
    assert torch.equal(apart.reshape(2, len(paths), paths.positions, 3), x[:, None].expand(-1, len(paths), -1, -1))
    torch.testing.assert_close(cross_merge(sequences, paths).reshape(x.shape), x * len(paths))


@FEW
@given(scan_paths(max_side=8))
def test_scan_reads_by_the_table(paths):
    x = torch.randn(1, paths.positions, 2)
    expected = np.where(paths.table[..., None] >= 0, x[0].numpy()[paths.table], 0.0)
    np.testing.assert_array_equal(cross_scan(x, paths)[0].numpy(), expected)


@FEW
@given(scan_paths(max_side=8))
def test_merge_ignores_padded_steps(paths):
    ys = torch.randn(1, len(paths), paths.length, 2)
    poisoned = torch.where(torch.from_numpy(paths.table < 0)[None, :, :, None], torch.nan, ys)
    assert torch.equal(cross_merge(poisoned, paths), cross_merge(ys, paths))


# --- scans along paths ------------------------------------------------------------------------------------------------


def scan(inputs, paths, backend, **options):
    return cross_selective_scan(**inputs, paths=paths, backend=backend, **options)


def permuted(inputs, move):
    """Apply `move` to every map: x (batch, H, W, C) and dt, B, C (batch, K, H, W, .)."""
    return inputs | {name: move(inputs[name]) for name in ("x", "dt", "B", "C")}


@FEW
@given(sides, sides, st.booleans())
def test_columns_are_rows_of_the_transposed_map(backend, height, width, flipped):
    row, column = ("h_flip", "v_flip") if flipped else ("h", "v")
    inputs = cross_selective_scan_inputs(1, (height, width), 2, 2, (column,))
    turned = permuted(inputs, lambda m: m.transpose(-3, -2))
    torch.testing.assert_close(scan(inputs, (column,), backend), scan(turned, (row,), backend).transpose(1, 2))


@FEW
@given(sides, sides)
def test_a_flip_is_the_scan_of_the_turned_map(backend, height, width):
    """Turning the map by 180 degrees swaps a row or column scan with its flip."""
    inputs = cross_selective_scan_inputs(1, (height, width), 2, 2, ("h", "v_flip"))
    turned = permuted(inputs, lambda m: m.flip(-3, -2))
    expected = scan(turned, ("h_flip", "v"), backend, merge=False).flip(-3, -2)
    torch.testing.assert_close(scan(inputs, ("h", "v_flip"), backend, merge=False), expected)


@FEW
@given(scan_paths(max_side=7, token=False))
def test_paths_do_not_mix(backend, paths):
    """The merged scan is the sum of the unmerged, and each of these is the scan along that path alone."""
    inputs = cross_selective_scan_inputs(2, paths.size, 2, 1, paths.names)
    apart = scan(inputs, paths, backend, merge=False)
    torch.testing.assert_close(scan(inputs, paths, backend), apart.sum(1))
    for k, name in enumerate(paths.names):
        alone = {n: t if n == "x" else t[:, k : k + 1] if n in ("dt", "B", "C") else t[k : k + 1] for n, t in inputs.items()}
        torch.testing.assert_close(scan(alone, (name,), backend), apart[:, k])


@FEW
@given(scan_paths(max_side=7, token=False), st.integers(1, 3))
def test_samples_and_channels_do_not_mix(backend, paths, batch):
    """The scan of a concatenation is the concatenation of scans, over samples and over channels."""
    inputs = cross_selective_scan_inputs(batch + 1, paths.size, 3, 2, paths.names)
    whole = scan(inputs, paths, backend)
    for part in (slice(batch), slice(batch, None)):
        torch.testing.assert_close(scan(permuted(inputs, lambda m, p=part: m[p]), paths, backend), whole[part])
    for part in (slice(1), slice(1, None)):
        channels = {n: inputs[n][..., part] for n in ("x", "D", "dt_bias")} | {n: inputs[n][:, part] for n in ("A", "dt_weight")}
        torch.testing.assert_close(scan(inputs | channels, paths, backend), whole[..., part])


@FEW
@given(scan_paths(max_side=7, token=False), st.data())
def test_causality(backend, paths, data):
    """A change at one position reaches exactly the steps from it on, along every path."""
    position = data.draw(st.integers(0, paths.positions - 1))
    inputs = cross_selective_scan_inputs(1, paths.size, 1, 1, paths.names, None)
    inputs |= {name: inputs[name].abs() + 0.1 for name in ("x", "B", "C")}  # all terms positive: nothing can cancel
    changed = inputs["x"].clone()
    changed.view(-1)[position] += 1.0
    before, after = (scan(inputs | {"x": x}, paths, backend, merge=False).reshape(len(paths), -1) for x in (inputs["x"], changed))
    for k, inverse in enumerate(paths.inverse):
        reached = torch.from_numpy(inverse >= inverse[position])
        assert torch.equal(before[k] != after[k], reached)


@FEW
@given(sides, sides, st.integers(2, 5), st.booleans())
def test_padded_steps_only_decay(backend, height, width, k, flipped):
    """A window path is its visited steps alone, with the state decayed by exp(softplus(dt_bias) A) at every padded one."""
    name = f"w{k}_flip" if flipped else f"w{k}"
    inputs = cross_selective_scan_inputs(1, (height, width), 2, 3, (name,), None)
    flat = {n: inputs[n].reshape(height * width, -1) for n in ("x", "dt", "B", "C")}
    A, D, bias = (inputs[n][0] for n in ("A", "D", "dt_bias"))
    h, expected = torch.zeros(2, 3, dtype=torch.float64), torch.empty(height * width, 2, dtype=torch.float64)
    for position in path_table(name, height, width):
        if position < 0:
            h = h * torch.exp(torch.nn.functional.softplus(bias)[:, None] * A)
            continue
        delta = torch.nn.functional.softplus(flat["dt"][position] + bias)[:, None]
        h = torch.exp(delta * A) * h + delta * flat["B"][position] * flat["x"][position][:, None]
        expected[position] = h @ flat["C"][position] + D * flat["x"][position]
    torch.testing.assert_close(scan(inputs, (name,), backend), expected.reshape(1, height, width, 2))


@FEW
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_sequence_in_two_parts(backend, first, second):
    """The last state is all that the rest of a sequence needs: what it carries over adds to the second part's own."""
    inputs = selective_scan_inputs(1, 3, first + second, 2, D=False, z=False, delta_bias=False, softplus=False)
    whole, end = selective_scan(**inputs, return_last_state=True, backend=backend)
    head, tail = (
        {n: t if t is None or n == "A" else t[..., part] for n, t in inputs.items()} for part in (slice(first), slice(first, None))
    )
    y, state = selective_scan(**head, return_last_state=True, backend=backend)
    torch.testing.assert_close(y, whole[..., :first])
    decay = torch.exp(tail["delta"].cumsum(-1)[:, :, None] * inputs["A"][:, :, None])  # (batch, dim, state, length)
    carried = (decay * state[..., None] * tail["C"][:, None]).sum(2)
    y, rest = selective_scan(**tail, return_last_state=True, backend=backend)
    torch.testing.assert_close(y + carried, whole[..., first:])
    torch.testing.assert_close(rest + decay[..., -1] * state, end)
