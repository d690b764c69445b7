"""Counted operations against hand counts, against published tables, and against PyTorch's own counter."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionssm.flops import count_flops
from visionssm.ops import CROSS, cross_merge, cross_scan, cross_selective_scan, selective_scan
from visionssm.ops.paths import path_length

OPS = torch.ops.visionssm
NANOS = ("vim_nano", "vmamba_nano", "local_vim_nano", "local_vmamba_nano")

# What the published repositories give, in 1e9, with as many digits.
VMAMBA = {
    "vanilla_vmamba_tiny": 5.627,
    "vanilla_vmamba_small": 11.232,
    "vanilla_vmamba_base": 18.020,
    "vmamba_tiny_s2l5": 4.858,
    "vmamba_small_s2l15": 8.716,
    "vmamba_base_s2l15": 15.359,
    "vmamba_tiny_s1l8": 4.906,
    "vmamba_small_s1l20": 8.612,
    "vmamba_base_s1l20": 15.221,
}
LOCAL_VMAMBA = {"local_vmamba_tiny": 5.7287, "local_vmamba_small": 11.3730}
LOCAL_VIM = {"local_vim_tiny": 1.4818, "local_vim_tiny_midclstok": 1.4892, "local_vim_small": 4.7713}
# Vim has no published counter; an independent count of its linear layers and convolutions, and with 9 for every cell of both scans.
VIM = {
    "vim_tiny_patch16_224": (1.293, 1.82),
    "vim_tiny_patch16_stride8_224": (4.790, 6.73),
    "vim_small_patch16_224": (4.851, 5.90),
    "vim_small_patch16_stride8_224": (17.976, 21.85),
    "vim_base_patch16_224": (18.766, 20.86),
}


def meta(name, **kwargs):
    return timm.create_model(name, device="meta", **kwargs)


def pooled_values(model):
    """A hierarchy's last map; the published counter also counts one addition for each value that is averaged."""
    return model.num_features * math.prod(model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[1:3])


# --- published tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VMAMBA)
def test_published_vmamba(name):
    """All digits of the table."""
    model = meta(name)
    assert round((count_flops(model).macs + pooled_values(model)) / 1e9, 3) == VMAMBA[name]


def test_published_vmamba_0220():
    """Its table has no more digits than this."""
    assert round(count_flops(meta("vmamba_tiny_0220")).macs / 1e9) == 5


@pytest.mark.parametrize("name", LOCAL_VMAMBA)
def test_published_local_vmamba(name):
    """To one in the table's last digit, once what its code computes at padded steps is added: it projects them, ours does not."""
    model = meta(name)
    padded, size = 0, 56
    for stage in model.layers:
        size = size if stage is model.layers[0] else size // 2
        for block in stage.blocks:
            _, rows, inner = block.op.x_proj_weight.shape
            lengths = [path_length(path, size, size) for path in block.op.paths]
            padded += (len(lengths) * (max(lengths) - size * size)) * rows * inner
            padded += (len(lengths) * max(lengths) - sum(lengths)) * block.op.dt_rank * inner
    count = count_flops(model)
    print(f"{name}: {count.macs / 1e9:.4f} G, published {LOCAL_VMAMBA[name]}, projections at padded steps {padded / 1e9:.4f}")
    assert abs((count.macs + padded + pooled_values(model)) / 1e9 - LOCAL_VMAMBA[name]) < 1e-4


def test_published_scans_of_local_vmamba():
    assert round(count_flops(meta("local_vmamba_tiny")).scan_macs / 1e9, 2) == 1.93


@pytest.mark.parametrize("name", VIM)
def test_independent_count_of_vim(name):
    """All digits, once the zeros are taken out: our one convolution for both directions has d_conv - 1 zero taps in each."""
    model = meta(name)
    _, inner, taps = model.layers[0].mixer.conv1d_weight.shape
    cells = 2 * len(model.layers) * model.pos_embed.shape[1] * inner
    count = count_flops(model)
    linear, nine = VIM[name]
    zeros = cells * (taps - 1)
    print(
        f"{name}: {count.macs / 1e9:.3f} G, counted elsewhere {nine} without skips {cells / 1e9:.3f}, zero taps {zeros / 1e9:.3f}"
    )
    without_zeros = count.macs - zeros
    assert round((without_zeros - count.scan_macs) / 1e9, 3) == linear
    assert round((without_zeros - cells) / 1e9, 2) == nine  # that figure leaves the skip D out


@pytest.mark.parametrize("name", LOCAL_VIM)
def test_published_local_vim(name):
    """Its counter takes convolution and projections once for four directions and scans as 5 N + 2; add what it leaves out."""
    model = meta(name)
    mixer, tokens = model.layers[0].mixer, model.pos_embed.shape[1]
    _, inner, taps = mixer.conv1d_weight.shape
    dim, depth, k = model.embed_dim, len(model.layers), len(mixer.paths)
    per_direction = inner * (taps + mixer.x_proj_weight.shape[1] + mixer.dt_rank)
    left_out = {
        "the other directions' convolutions and projections": depth * tokens * per_direction * (k - 1),
        "scans at 9 N + 1 instead of 5 N + 2": depth * tokens * k * inner * (4 * mixer.d_state - 1),
        "LayerNorms of the four directions": depth * tokens * k * inner * 5,
        "channel attention of the other directions": depth * (k - 1) * 2 * inner * (inner // 8),
        "RMSNorms, which only that counter takes": -(depth + 1) * tokens * dim,
    }
    count = count_flops(model)
    print(f"{name}: {count.macs / 1e9:.4f} G, published {LOCAL_VIM[name]}, with")
    for what, macs in left_out.items():
        print(f"    {macs / 1e9:+.4f} G {what}")
    assert round((count.macs - sum(left_out.values())) / 1e9, 3) == round(LOCAL_VIM[name], 3)


# --- hand counts ----------------------------------------------------------------------------------------------------------


class Counted:
    """A number that counts what is done with it."""

    done = 0

    def _count(self, other=None):
        Counted.done += 1
        return self

    __add__ = __mul__ = __truediv__ = exp = log = _count


def counted(length):
    return [Counted() for _ in range(length)]


def step_by_hand(state, rank, bias, softplus, skip, backward):
    """One step of one channel of one path, number by number; with `backward` its recomputation and gradients, but no output."""
    Counted.done = 0
    x = dy = one = D = dD = delta = ddt_bias = Counted()
    A, B, C, h, g, dA, dB, dC = (counted(state) for _ in range(8))
    dt, ddt, weight, dweight = (counted(rank) for _ in range(4))
    for r in range(rank):
        delta = delta + weight[r] * dt[r]
    if bias:
        delta = delta + one
    if softplus:
        grown = delta.exp()
        more = grown + one
        delta = more.log()
    scaled = delta * x
    for n in range(state):
        h[n] = (delta * A[n]).exp() * h[n] + scaled * B[n]
    if not backward:
        y = Counted()
        for n in range(state):
            y = y + C[n] * h[n]
        if skip:
            y = y + D * x
        return Counted.done
    Bg = Ap = Counted()
    for n in range(state):
        g[n] = C[n] * dy + one * g[n]
        Bg = Bg + B[n] * g[n]
        dB[n] = dB[n] + scaled * g[n]
        dC[n] = dC[n] + h[n] * dy
        p = one * h[n] * g[n]
        dA[n] = dA[n] + delta * p
        Ap = Ap + A[n] * p
    dx = delta * Bg
    ddelta = x * Bg + Ap
    if skip:
        dx, dD = dx + D * dy, dD + dy * x
    if softplus:
        ddelta = ddelta * (grown / more)
    if bias:
        ddt_bias = ddt_bias + ddelta
    for r in range(rank):
        ddt[r], dweight[r] = ddt[r] + weight[r] * ddelta, dweight[r] + dt[r] * ddelta
    return Counted.done


def scan_inputs(batch=2, size=(3, 5), channels=7, state=3, rank=2, paths=CROSS, bias=True, skip=True, device="cpu"):
    k, make = len(paths), {"device": device, "requires_grad": True}
    return {
        "x": torch.randn(batch, *size, channels, **make),
        "dt": torch.randn(batch, k, *size, rank or channels, **make),
        "A": torch.full((k, channels, state), -1.0, **make),
        "B": torch.randn(batch, k, *size, state, **make),
        "C": torch.randn(batch, k, *size, state, **make),
        "D": torch.randn(k, channels, **make) if skip else None,
        "dt_weight": torch.randn(k, channels, rank, **make) if rank else None,
        "dt_bias": torch.randn(k, channels, **make) if bias else None,
        "paths": paths,
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0},
        {"bias": False, "dt_softplus": False},
        {"skip": False, "merge": False},
        {"state": 1, "paths": ("w2", "v_flip")},
    ],
)
def test_scan_is_counted_as_by_hand(options, device):
    shape = {key: value for key, value in options.items() if key not in ("dt_softplus", "merge")}
    inputs = scan_inputs(**shape, device=device)
    softplus = options.get("dt_softplus", True)
    with FlopCounterMode(display=False) as counter:
        y = cross_selective_scan(**inputs, dt_softplus=softplus, merge=options.get("merge", True))
        forward = counter.get_total_flops()
        y.sum().backward()
    by_hand = {"state": 3, "rank": 2, "bias": True, "skip": True} | {k: v for k, v in shape.items() if k != "paths"}
    steps = sum(path_length(path, 3, 5) for path in inputs["paths"])  # w2 pads to 4 x 6
    assert forward == 2 * steps * 7 * step_by_hand(**by_hand, softplus=softplus, backward=False)
    assert counter.get_total_flops() - forward == 2 * steps * 7 * step_by_hand(**by_hand, softplus=softplus, backward=True)


def test_published_rule_for_one_scan():
    """9 B L D N + B L D by its letters."""

    class Scan(nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs = nn.ParameterDict({k: v.detach() for k, v in scan_inputs().items() if isinstance(v, torch.Tensor)})

        def forward(self, images):
            return cross_selective_scan(**self.inputs, paths=CROSS)

    count = count_flops(Scan())
    steps, channels, state, rank = 2 * 3 * 5, 4 * 7, 3, 2
    assert count.scan_macs == 9 * steps * channels * state + steps * channels
    assert count.macs == count.scan_macs + steps * channels * rank
    assert count.flops == count.scan_flops


@pytest.mark.parametrize("groups", [1, 3])
def test_sequence_scan(groups):
    """mamba's layout, which reaches another operator by backend, costs the same in both; the gate is elementwise."""
    batch, dim, state, length = 2, 6, 4, 11
    u, delta, z = (torch.randn(batch, dim, length, device="meta", requires_grad=True) for _ in range(3))
    A = torch.empty(dim, state, device="meta", requires_grad=True)
    B, C = (torch.empty(batch, groups, state, length, device="meta", requires_grad=True) for _ in range(2))
    D, bias = (torch.empty(dim, device="meta", requires_grad=True) for _ in range(2))
    steps = batch * dim * length
    forward = steps * step_by_hand(state, 0, True, True, True, backward=False)
    backward = steps * step_by_hand(state, 0, True, True, True, backward=True)
    with FlopCounterMode(display=False) as chunked:
        selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True).sum().backward()
    assert chunked.get_flop_counts()["Global"] == {OPS.cross_selective_scan: forward, OPS.cross_selective_scan_backward: backward}
    pytest.importorskip("triton")
    with FlopCounterMode(display=False) as triton:
        OPS.selective_scan(u, delta, A, B, C, D, z, bias, True, False)[0].sum().backward()
    assert triton.get_flop_counts()["Global"] == {OPS.selective_scan: forward, OPS.selective_scan_backward: backward}


def test_moving_is_free():
    with FlopCounterMode(display=False) as counter:
        cross_merge(cross_scan(torch.randn(1, 4, 4, 2), CROSS), CROSS, (4, 4))
    assert counter.get_flop_counts()["Global"] == {OPS.cross_scan: 0, OPS.cross_merge: 0}


def test_layers_by_hand():
    """A convolution of 8 filters of 3 x 3 x 3 on 32 x 32, a LayerNorm of 8 channels, a linear layer of 8 x 5 at each position."""

    class Layers(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x).permute(0, 2, 3, 1)))

    count = count_flops(Layers(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 5)), (3, 32, 32), backward=True)
    convolution, linear, positions = 8 * 27, 8 * 5, 32 * 32
    assert count.flops == 2 * positions * (convolution + linear)
    assert count.macs == positions * (convolution + linear + 5 * 8)
    assert count.scan_flops == count.scan_macs == 0
    assert count.backward_flops == 2 * positions * (convolution + 2 * linear)  # the image has no gradient


def test_backward_of_grouped_convolution():
    """As many multiply-adds for the weight as for the output: each filter reads one channel."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16))
    count = count_flops(model, (3, 8, 8), backward=True)
    pointwise, depthwise = 2 * 64 * 3 * 16, 2 * 64 * 9 * 16
    assert (count.flops, count.backward_flops) == (pointwise + depthwise, pointwise + 2 * depthwise)


# --- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NANOS)
def test_linear_in_the_batch(name):
    one, three = count_flops(meta(name), (3, 32, 32), backward=True), count_flops(meta(name), (3, 3, 32, 32), backward=True)
    assert (one.shape, three.shape) == ((1, 3, 32, 32), (3, 3, 32, 32))
    for field in ("flops", "scan_flops", "macs", "scan_macs", "backward_flops"):
        assert getattr(three, field) == 3 * getattr(one, field) > 0


@pytest.mark.parametrize("name", NANOS)
def test_real_tensors_count_as_meta_ones(name):
    model = timm.create_model(name)
    assert count_flops(model, (3, 40, 32), backward=True) == count_flops(meta(name), (3, 40, 32), backward=True)


def test_model_is_left_as_it_was():
    model = timm.create_model("vmamba_nano", drop_path_rate=0.5)
    model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    count_flops(model, (3, 32, 32), backward=True)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_plain_counter_sees_the_scans():
    """FlopCounterMode by itself: the same forward count, and the backward scan."""
    model = meta("vmamba_nano")
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.empty(1, 3, 32, 32, device="meta"))
        forward = counter.get_total_flops()
        logits.sum().backward()
    count = count_flops(model, (3, 32, 32))
    operators = counter.get_flop_counts()["Global"]
    assert (forward, operators[OPS.cross_selective_scan]) == (count.flops, count.scan_flops)
    assert operators[OPS.cross_selective_scan_backward] > count.scan_flops


def test_checkpointed_model_pays_its_second_forward():
    model = meta("vim_nano")
    plain = count_flops(model, (3, 32, 32), backward=True)
    model.set_grad_checkpointing()
    again = count_flops(model.train(), (3, 32, 32), backward=True)
    assert again.flops == plain.flops
    second = again.backward_flops - plain.backward_flops
    assert plain.scan_flops < second < plain.flops  # PyTorch stops each block's second run once it has what the backward needs


def test_features_and_frozen_weights():
    features = count_flops(meta("vmamba_nano", features_only=True), (3, 32, 32), backward=True)
    assert features.flops == count_flops(meta("vmamba_nano", num_classes=0), (3, 32, 32)).flops
    frozen = meta("vmamba_nano").requires_grad_(False)
    assert count_flops(frozen, (3, 32, 32), backward=True).backward_flops == 0
    assert count_flops(frozen, (3, 32, 32)).backward_flops is None


def test_words():
    text = str(count_flops(meta("vmamba_tiny_s1l8")))
    assert text == "1 x 3 x 224 x 224: 4.906 G multiply-adds by the published rule (scans 0.063), 9.714 GFLOPs (scans 0.291)"


@pytest.mark.parametrize("size", [224, (224, 224), (3, 0, 224), (3, 224, 224.0), (1, 1, 3, 224, 224), "224"])
def test_input_size_is_checked(size):
    with pytest.raises(ValueError, match=r"input_size: expected \(channels, height, width\) or .*, got "):
        count_flops(nn.Identity(), size)
