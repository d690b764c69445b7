"""Wrong arguments: every one is refused before any work, by an error that names the argument, what it got and what it expected."""

import functools

import numpy as np
import pytest
import torch

from visionssm.ops import (
    CROSS,
    ScanPaths,
    cross_merge,
    cross_merge_ref,
    cross_scan,
    cross_scan_ref,
    cross_selective_scan,
    cross_selective_scan_packed,
    cross_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from visionssm.ops.testing import cross_selective_scan_inputs, pack, selective_scan_inputs

F32 = torch.float32


def refused(call, error, *message):
    """`call` raises exactly `error`, and its message contains every part of `message`."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for part in message:
        assert part in str(caught.value), f"{part!r} not in {caught.value!s}"


def changed(inputs, name, change):
    """`inputs` with tensor `name` replaced: by `change(tensor)` or by `change` itself."""
    return inputs | {name: change(inputs[name]) if callable(change) else change}


SCAN = selective_scan_inputs(batch=2, dim=6, length=13, state=4, groups=2, dtype=F32)
IMAGE = cross_selective_scan_inputs(batch=2, size=(3, 5), channels=4, state=2, rank=2, dtype=F32)
ORDERED = cross_selective_scan_inputs(batch=2, size=(3, 5), channels=4, state=2, rank=2, dtype=F32, order="scan")
PACKED = pack(IMAGE)
FORMS = {
    "selective_scan": (selective_scan, SCAN, {"delta_softplus": True}),
    "image": (cross_selective_scan, IMAGE, {"paths": CROSS}),
    "scan": (cross_selective_scan, ORDERED, {"paths": CROSS, "order": "scan"}),
    "packed": (cross_selective_scan_packed, PACKED, {"paths": CROSS}),
    "cross_scan": (cross_scan, {"x": IMAGE["x"]}, {"paths": CROSS}),
    "cross_merge": (cross_merge, {"ys": ORDERED["x"]}, {"paths": CROSS, "size": (3, 5)}),
}
TENSORS = [(form, name) for form, (_, inputs, _) in FORMS.items() for name in inputs]
OPTIONAL = ("D", "z", "delta_bias", "dt_weight", "dt_bias")


@pytest.mark.parametrize("form", FORMS)
def test_the_unchanged_call_is_accepted(form):
    function, inputs, options = FORMS[form]
    assert function(**inputs, **options).isfinite().all()


@pytest.mark.parametrize(("form", "name"), TENSORS)
def test_every_tensor_argument(form, name):
    """Kind, dtype, device, rank and the size of every axis, for every tensor argument of every operator."""
    function, inputs, options = FORMS[form]

    def call(change):
        return lambda: function(**changed(inputs, name, change), **options)

    refused(call("image"), TypeError, f"{name}: expected a tensor, got str")
    refused(call(lambda t: t.numpy()), TypeError, f"{name}: expected a tensor, got ndarray")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        refused(call(lambda t, d=dtype: t.to(d)), TypeError, f"{name}: expected a float16, bfloat16, float32", str(dtype))
    if name not in OPTIONAL:
        refused(call(None), TypeError, f"{name}: expected a tensor, got NoneType")
    refused(call(torch.tensor(1.0)), ValueError, f"{name}: expected", "got shape ()")
    refused(call(lambda t: t[None, None, None]), ValueError, f"{name}: expected", str(tuple(inputs[name][None, None, None].shape)))
    if len(inputs) > 1:
        is_first = name == next(iter(inputs))  # the others are held to its device
        refused(call(lambda t: t.to("meta")), ValueError, "expected meta" if is_first else f"{name}: is on meta, expected cpu")
        wide = {key: t.double() for key, t in inputs.items()}
        low = changed(wide, name, lambda t: t.half())
        refused(lambda: function(**low, **options), TypeError, f"{name}: is torch.float16 beside float64")


@pytest.mark.parametrize(("form", "name"), TENSORS)
def test_every_size(form, name):
    """One axis empty, and one too long wherever other arguments fix its size."""
    function, inputs, options = FORMS[form]
    free = {("cross_scan", "x"): (0, 1, 2, 3), ("cross_merge", "ys"): (0, 3)}.get((form, name), ())
    for axis in range(inputs[name].dim()):
        empty = inputs[name].narrow(axis, 0, 0)
        refused(lambda t=empty: function(**changed(inputs, name, t), **options), ValueError, ": ", "expected")
        if axis not in free:
            longer = torch.cat([inputs[name], inputs[name].narrow(axis, 0, 1)], dim=axis)
            refused(lambda t=longer: function(**changed(inputs, name, t), **options), ValueError, ": ", "expected")


@pytest.mark.parametrize(
    ("form", "name", "change", "message"),
    [
        ("selective_scan", "u", lambda t: t[0, 0], "expected (batch, dim, length), got shape (13)"),
        ("selective_scan", "delta", lambda t: t[..., 1:], "expected (batch, dim, length) = (2, 6, 13), got shape (2, 6, 12)"),
        ("selective_scan", "B", lambda t: t[:, :1].expand(2, 4, 4, 13), "has 4 groups, expected a divisor of dim = 6"),
        ("selective_scan", "C", lambda t: t[:, 0], "expected (batch, groups, state, length) = (2, 2, 4, 13), got shape (2, 4, 13)"),
        ("image", "dt", lambda t: t[:, :3], "expected (batch, K, H, W, R) = (2, 4, 3, 5, 2), got shape (2, 3, 3, 5, 2)"),
        ("image", "dt", lambda t: t[..., :1], "expected (batch, K, H, W, R) = (2, 4, 3, 5, 2), got shape (2, 4, 3, 5, 1)"),
        ("image", "B", lambda t: t.transpose(2, 3), "expected (batch, K, H, W, N) = (2, 4, 3, 5, 2), got shape (2, 4, 5, 3, 2)"),
        ("image", "x", lambda t: t[:, None], "axis K is 1, expected 4 (the number of paths)"),
        ("image", "x", lambda t: t[:, None].expand(2, 3, 3, 5, 4), "axis K is 3, expected 4 (the number of paths)"),
        ("image", "A", lambda t: t[:3], "expected (K, C, N) = (4, 4, 2), got shape (3, 4, 2)"),
        ("image", "D", lambda t: t.flatten(), "expected (K, C) = (4, 4), got shape (16)"),
        ("scan", "x", lambda t: t[:, :, None], 'expected (batch, K, L\', C) with order="scan", got shape (2, 4, 1, 15, 4)'),
        (
            "packed",
            "x_dbl",
            lambda t: t[..., :-1],
            "expected (batch, H, W, K, R + 2N) = (2, 3, 5, 4, 6), got shape (2, 3, 5, 4, 5)",
        ),
        ("cross_merge", "ys", lambda t: t[:, :, 1:], "axis L' is 14, expected 15 (the longest of paths)"),
        ("cross_merge", "ys", lambda t: t[:, 1:], "axis K is 3, expected 4 (the number of paths)"),
    ],
)
def test_messages(form, name, change, message):
    function, inputs, options = FORMS[form]
    refused(lambda: function(**changed(inputs, name, change), **options), ValueError, f"{name}: {message}")


def test_step_of_the_other_width():
    """Without dt_weight the step has C channels, not R."""
    for form, message in (
        ("image", "dt: expected (batch, K, H, W, C) = (2, 4, 3, 5, 4), got shape (2, 4, 3, 5, 2)"),
        ("packed", "x_dbl: expected (batch, H, W, K, C + 2N) = (2, 3, 5, 4, 8), got shape (2, 3, 5, 4, 6)"),
    ):
        function, inputs, options = FORMS[form]
        refused(lambda f=function, i=inputs, o=options: f(**changed(i, "dt_weight", None), **o), ValueError, message)


@pytest.mark.parametrize("form", ["image", "scan", "packed", "cross_scan", "cross_merge"])
@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("h", "v", "h_flip", "v_flp"), "paths: unknown path 'v_flp', did you mean 'v_flip'? (known: h, v, wK"),
        (("h", "v", "w0", "w7"), "paths: unknown path 'w0'"),
        (("h", "v", "w2", "w-7"), "paths: unknown path 'w-7', did you mean 'w7'?"),
        (("h", "v", "h ", "v"), "paths: unknown path 'h '"),
        (("h", "v", 7, True), "paths: unknown path 7"),
        ("hv", "paths: expected a tuple of path names or a ScanPaths, got 'hv'"),
        (None, "paths: expected a tuple of path names or a ScanPaths, got None"),
        ({"h", "v"}, "paths: expected a tuple of path names or a ScanPaths, got {"),
        ((), "paths: got no path; expected at least one name"),
    ],
    ids=str,
)
def test_paths(form, paths, message):
    function, inputs, options = FORMS[form]
    refused(lambda: function(**inputs, **options | {"paths": paths}), ValueError, message)


@pytest.mark.parametrize("form", ["image", "packed", "cross_scan", "cross_merge"])
def test_paths_of_another_map(form):
    function, inputs, options = FORMS[form]
    other = ScanPaths(CROSS, (5, 3))
    refused(
        lambda: function(**inputs, **options | {"paths": other}), ValueError, "paths: made for a map of (5, 3), got a map of (3, 5)"
    )


def test_paths_of_another_length():
    function, inputs, options = FORMS["scan"]
    other = ScanPaths(CROSS, (4, 4))
    refused(
        lambda: function(**inputs, **options | {"paths": other}), ValueError, "x: axis L' is 15, expected 16 (the longest of paths)"
    )


def test_inserted_token():
    """A token belongs to the flat form of cross_scan and to order="scan"."""
    paths = ScanPaths(CROSS, (3, 5), 7)
    refused(lambda: cross_selective_scan(**IMAGE, paths=paths), ValueError, 'paths: token_at needs order="scan"')
    refused(
        lambda: cross_selective_scan_packed(**PACKED, paths=paths), ValueError, "paths: token_at is for cross_scan and cross_merge"
    )
    refused(
        lambda: cross_scan(IMAGE["x"], paths), ValueError, "x: with token_at expected a flat map (batch, 16, C), got (2, 3, 5, 4)"
    )
    refused(
        lambda: cross_scan(IMAGE["x"].flatten(1, 2), paths),
        ValueError,
        "x: axis positions is 15, expected 16 (the positions of paths)",
    )
    refused(lambda: cross_merge(ORDERED["x"], paths), ValueError, "ys: axis L' is 15, expected 16")
    refused(lambda: cross_scan(IMAGE["x"].flatten(1, 2), CROSS), ValueError, "x: expected (batch, H, W, C), got shape (2, 15, 4)")


@pytest.mark.parametrize("size", [(0, 5), (3, -1), (0, 0)])
def test_empty_map(size):
    refused(lambda: ScanPaths(CROSS, size), ValueError, f"paths: a map of {size[0]} x {size[1]} has no position", "at least 1")
    refused(lambda: cross_merge(ORDERED["x"], CROSS, size), ValueError, "size: a map of", "at least 1")


@pytest.mark.parametrize("size", [5, (3,), (3, 5, 1), ("3", "5"), (3.0, 5.0), (True, 5), "35", torch.tensor([3, 5])], ids=str)
def test_map_size_of_another_kind(size):
    refused(lambda: ScanPaths(CROSS, size), ValueError, "paths: expected a map size (H, W) of two integers, got ", repr(size))
    refused(lambda: cross_merge(ORDERED["x"], CROSS, size), ValueError, "size: expected a map size (H, W) of two integers")


def test_map_size_left_out():
    refused(lambda: cross_merge(ORDERED["x"], CROSS), ValueError, "size: expected (H, W), got None")


@pytest.mark.parametrize("token_at", [-1, 16, True, "7", 7.0])
def test_token_position(token_at):
    message = f"paths: token_at is {token_at!r}, expected None or an index from 0 to 15 (H * W)"
    refused(lambda: ScanPaths(CROSS, (3, 5), token_at), ValueError, message)


def test_map_size_may_be_any_integer():
    """numpy's integers and a list are integers and a pair; equal paths are equal and share their tables."""
    paths = ScanPaths(list(CROSS), [np.int64(3), 5], np.int32(7))
    assert paths == ScanPaths(CROSS, (3, 5), 7)
    assert paths.table is ScanPaths(CROSS, (3, 5), 7).table
    assert cross_merge(cross_scan(torch.ones(1, 3, 5, 2), CROSS), CROSS, (np.int64(3), np.int64(5))).shape == (1, 3, 5, 2)


@pytest.mark.parametrize("form", ["selective_scan", "image", "scan", "packed"])
def test_backend(form):
    function, inputs, options = FORMS[form]

    def call(backend):
        return lambda: function(**inputs, **options, backend=backend)

    refused(
        call("chunk"),
        ValueError,
        "backend: unknown backend 'chunk'",
        "did you mean 'chunked'?",
        "known: reference, chunked, triton",
    )
    refused(call(True), ValueError, "backend: unknown backend True (known: reference, chunked, triton")
    refused(call(["chunked"]), ValueError, "backend: unknown backend ['chunked']")


def test_backend_that_cannot_run():
    """Asked for by name it raises and says why, rather than falling back."""
    inputs = cross_selective_scan_inputs()
    message = "backend: 'triton' cannot run here: the Triton kernels take float16, bfloat16 and float32, not torch.float64"
    refused(lambda: cross_selective_scan(**inputs, paths=CROSS, backend="triton"), RuntimeError, message)


@pytest.mark.parametrize(
    ("form", "flag"),
    [
        ("selective_scan", "delta_softplus"),
        ("selective_scan", "return_last_state"),
        ("image", "dt_softplus"),
        ("image", "merge"),
        ("packed", "dt_softplus"),
        ("packed", "merge"),
        ("cross_merge", "merge"),
    ],
)
def test_flags(form, flag):
    function, inputs, options = FORMS[form]
    for value in ("image", 1, None, torch.tensor(True)):
        call = functools.partial(function, **inputs, **options | {flag: value})
        refused(call, TypeError, f"{flag}: expected True or False, got {value!r}")


def test_order():
    for order in ("raster", True, None, "Image"):
        message = f'order: got {order!r}, expected "image" or "scan"'
        refused(lambda o=order: cross_selective_scan(**IMAGE, paths=CROSS, order=o), ValueError, message)


def test_twins_check_their_arguments():
    """A twin is a public function too: what does not fit is refused, not broadcast or cut."""
    x, dt, B = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 3, 4, 5), torch.zeros(2, 2, 3, 4, 3)
    with pytest.raises(ValueError, match="A: expected"):
        cross_selective_scan_ref(x, dt, torch.zeros(3, 5, 3), B, B, paths=("h", "v"))
    u = torch.zeros(1, 2, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match="u: expected"):
        selective_scan_ref(u, u, torch.zeros(2, 1), torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="ys: axis L' is 9, expected 4"):
        cross_merge_ref(torch.randn(1, 2, 9, 1), ("h", "v"), (2, 2))
    with pytest.raises(ValueError, match="x: expected"):
        cross_scan_ref(torch.randn(2, 3), ("h",))


def test_window_too_large():
    with pytest.raises(ValueError, match="windows of at most 1024"):
        ScanPaths(("w99999",), (3, 4))
