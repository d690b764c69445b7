"""Recording: no trace in the model, no change of its outputs, any dtype, device and mode; clear errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import build
from torch.testing import assert_close

from visionssm.errors import UserError
from visionssm.explain import Tape, record, rollout
from visionssm.explain.attention import INCLUDES


def taped(kind="vmamba", dtype=torch.float32):
    model, images = build(kind, dtype)
    with record(model) as tape, torch.no_grad():
        model(images)
    return tape


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_outputs_and_model_stay(kind):
    model, images = build(kind, torch.float32)
    with torch.no_grad():
        before = model(images)
        with record(model) as tape:
            assert hooks(model) == len(tape) + 1
            assert torch.equal(model(images), before)
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="stop"), record(model):
        raise RuntimeError("stop")
    assert hooks(model) == 0


def test_inputs_are_not_copied():
    model, images = build("vim", torch.float32)
    seen = []
    with record(model) as tape:
        model.layers[0].mixer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(images)
    kept = tape.layers[0].inputs[0]
    assert kept.data_ptr() == seen[0].data_ptr()
    assert not kept.requires_grad


def test_explaining_stays_out_of_the_package_and_its_import():
    code = (
        "import sys, visionssm; assert not [m for m in sys.modules if m.startswith(('visionssm.explain', 'captum', 'matplotlib'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, visionssm.explain; assert not [m for m in sys.modules if m.startswith(('captum', 'matplotlib'))]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("include", INCLUDES)
def test_half_precision(kind, include):
    """bfloat16 models: the attention of the rounded dt, B and C, computed in float32."""
    model, images = build(kind, torch.bfloat16)
    with record(model) as tape, torch.no_grad():
        model(images)
    wide, _ = build(kind, torch.bfloat16)
    with record(wide.double()) as exact:
        for layer, other in zip(exact.layers, tape.layers, strict=True):
            layer.keep(tuple(m.double() if isinstance(m, torch.Tensor) else m for m in other.inputs), other.grid)
    actual, expected = tape.attention(0).include(include).rows("mean"), exact.attention(0).include(include).rows("mean")
    assert actual.dtype == torch.float32
    assert_close(actual.double(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_autocast(kind):
    """Under autocast dt, B and C are those of the model's own forward."""
    model, images = build(kind, torch.float32)
    with record(model) as tape, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    layer = tape.layers[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        paths = (tape.attention(0)._operands.paths,) if kind.startswith("local_vim") else ()
        x_dbl = layer.mixer.scan_inputs(layer.inputs[0], *paths)[1]
    assert x_dbl.dtype == torch.bfloat16
    if paths:  # the row of steps of every path
        x_dbl = x_dbl.transpose(1, 2).unsqueeze(1)
    assert torch.equal(tape.attention(0)._operands.x_dbl, x_dbl.float())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes(kind, mode):
    """The context that the model ran in, and the one the caller is in, do not matter."""
    model, images = build(kind, torch.float32)
    with record(model) as tape, mode():
        model(images)
        inside = [tape.attention(0).include(include).rows([0, "mean"]) for include in INCLUDES]
    outside = [tape.attention(0).include(include).rows([0, "mean"]) for include in INCLUDES]
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_samples_do_not_mix(kind):
    model, images = build(kind, torch.float64)
    with record(model) as tape, torch.no_grad():
        model(images)
        both = [tape.attention(-1).include(include).matrix() for include in INCLUDES] + [rollout(tape)]
        model(images[1:])
        alone = [tape.attention(-1).include(include).matrix() for include in INCLUDES] + [rollout(tape)]
    for a, b in zip(both, alone, strict=True):
        assert_close(a[1:], b, rtol=1e-9, atol=1e-12)


def test_chosen_layers():
    model, images = build("vim")
    with record(model, layers=[-1]) as tape:
        model(images)
    assert tape.attention(1).rows("cls").shape == (2, tape.layout(1).tokens)
    with pytest.raises(UserError, match=r"layer: 0 is not among the recorded"):
        tape.attention(0)


def test_inside_a_wrapper():
    model, images = build("vmamba")
    wrapper = torch.nn.Sequential(torch.nn.Identity(), model)
    with record(wrapper) as tape:
        wrapper(images)
    assert isinstance(tape, Tape)
    assert tape.attention(0).batch == 2


def test_checkpointing():
    """The recomputation in the backward pass records the same again."""
    model, images = build("vmamba")
    model.set_grad_checkpointing()
    with record(model) as tape:
        out = model(images)
        before = tape.attention(0).rows("mean")
        out.sum().backward()
        assert torch.equal(tape.attention(0).rows("mean"), before)


def test_compiled_models_are_refused():
    model, _ = build("vim")
    with pytest.raises(UserError, match=r"compiled model cannot be recorded.*_orig_mod"), record(torch.compile(model)):
        pass
    model.layers[0].compile()
    with pytest.raises(UserError, match=r"layers\.0 is compiled.*before torch\.compile"), record(model):
        pass
    model, _ = build("vim")
    model.compile()
    with pytest.raises(UserError, match="the model is compiled"), record(model):
        pass


def test_other_models_are_refused():
    with (
        pytest.raises(UserError, match="model: expected a Linear with one network of the zoo inside, found none"),
        record(torch.nn.Linear(2, 2)),
    ):
        pass
    pair = torch.nn.ModuleList([build("vim")[0], build("vmamba")[0]])
    with pytest.raises(UserError, match="found VisionMamba, VMamba"), record(pair):
        pass


def test_bad_layers():
    model, _ = build("vim")
    for layers in ([2], [-3], [0.0], [True]):
        with (
            pytest.raises(UserError, match=r"layer: got .*, expected 0 to 1 .*the model has 2 layers"),
            record(model, layers=layers),
        ):
            pass
    with pytest.raises(UserError, match=r"layers: got array\(\[0, 1\]\), expected"), record(model, layers=np.arange(2)):
        pass
    with pytest.raises(UserError, match=r"layers: got 'last', expected"), record(model, layers="last"):
        pass
    with record(model) as tape:
        pass
    with pytest.raises(UserError, match=r"nothing is recorded; call the model inside `with record"):
        tape.attention(0)
    with pytest.raises(UserError, match=r"layer: got 2, expected 0 to 1"):
        tape.attention(2)


def test_changed_weights():
    model, images = build("vmamba")
    with record(model) as tape:
        model(images)
    tape.attention(0)
    with torch.no_grad():
        model.layers[0].blocks[0].op.Ds.add_(1.0)
    with pytest.raises(UserError, match=r"layers\.0\.blocks\.0\.op: its weights have changed since it was recorded"):
        tape.attention(0)


def test_bad_questions():
    attention = taped("vim").attention(0)
    hierarchical = taped("vmamba").attention(0)
    layers = taped("local_vmamba")
    for call, message in (
        (lambda: hierarchical.rows("cls"), 'token: "cls", but the model has no class token'),
        (lambda: attention.rows(36), "token: got 36, expected an index from 0 to 35"),
        (lambda: attention.rows((5, 0)), r"token: got \(5, 0\), outside of the 5 x 7 grid"),
        (lambda: attention.rows((0, -1)), r"token: got \(0, -1\), outside of the 5 x 7 grid"),
        (lambda: attention.rows("class"), "token: got 'class', expected"),
        (lambda: attention.rows(True), "token: got True, expected"),
        (
            lambda: attention.direction("forwards"),
            "direction: 'forwards' is none of: h, h_flip, forward, backward; did you mean forward",
        ),
        (lambda: attention.direction(2), "direction: got 2, expected an index from 0 to 1"),
        (lambda: hierarchical.direction("forward"), "direction: 'forward' is none of: h, v, h_flip, v_flip$"),
        (lambda: attention.include("skip"), "include: got 'skip', expected one of ssm, ssm"),
        (lambda: attention.rows(0, channels=320), "channels: got 320, expected"),
        (lambda: attention.rows(0, channels="mean"), "channels: got 'mean', expected"),
        (lambda: attention.rows(0, channels=slice(320, None)), r"channels: got slice\(320, None, None\), expected"),
        (lambda: attention.matrix(block=0), "block: got 0, expected a number of rows from 1"),
        (lambda: attention.vector_product(torch.ones(2, 3)), r"vector: got \(2, 3\), expected \(batch, L\) = \(2, 36\)"),
        (lambda: attention.apply(torch.ones(2, 36, 3)), r"v: got \(2, 36, 3\), expected \(batch, L, E\) = \(2, 36, 320\)"),
        (lambda: attention.to_map(torch.ones(2, 35)), r"rows: got \(2, 35\), expected L = 36"),
        (lambda: attention.include("mixer").row_bound(), 'normalize: rows of include "mixer" have no cheap bound'),
        (lambda: layers.attention(2), "layer: got 2"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_named_directions():
    attention = taped("vim").attention(0)
    assert torch.equal(attention.direction("forward").matrix(), attention.direction("h").matrix())
    assert torch.equal(attention.direction("backward").matrix(), attention.direction(1).matrix())
    forward, backward = (attention.direction(k).matrix() for k in (0, 1))
    assert forward.triu(1).count_nonzero() == 0
    assert backward.tril(-1).count_nonzero() == 0
    assert forward.tril(-1).count_nonzero() > 0


@pytest.mark.parametrize(("kind", "grid"), [("vim", (5, 7)), ("local_vim_cls", (5, 7))])
def test_maps_drop_the_class_token(kind, grid):
    attention = taped(kind).attention(0)
    middle = grid[0] * grid[1] // 2
    assert (attention.layout.grid, attention.layout.class_index) == (grid, middle)
    matrix = attention.matrix()
    row, column = divmod(middle, grid[1])  # the patch that follows the class token
    assert_close(attention.rows("cls"), matrix[:, middle])
    assert_close(attention.rows((row, column)), matrix[:, middle + 1])
    assert_close(attention.rows((0, 1)), matrix[:, 1])
    kept = [i for i in range(attention.layout.tokens) if i != middle]
    assert torch.equal(attention.to_map(matrix), matrix[..., kept].unflatten(-1, grid))
    assert_close(attention.rows("mean"), matrix[:, kept].mean(1))


def test_a_pass_that_ends_early_leaves_nothing_of_the_one_before():
    model, images = build("vmamba", torch.float32)
    with record(model) as tape, torch.no_grad():
        model(images)
        model.forward_intermediates(images[:1], indices=[0], stop_early=True, intermediates_only=True)
    assert tape.attention(0).batch == 1
    with pytest.raises(UserError, match=r"layer: \d+ did not run in the last forward pass"):
        rollout(tape)


def test_weights_that_change_before_the_factors_are_made():
    tape = taped("vim")
    attention = tape.attention(0).include("mixer")
    with torch.no_grad():
        tape.layers[0].mixer.conv1d_weight.mul_(3)
    with pytest.raises(UserError, match="its weights have changed since it was recorded"):
        attention.rows(0)


@pytest.mark.parametrize("include", INCLUDES)
def test_weights_that_change_while_an_attention_is_in_use(kind, include):
    model, images = build(kind, torch.float32)
    with record(model) as tape, torch.no_grad():
        model(images)
    attention = tape.attention(0).include(include)
    before = attention.rows([0, "mean"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(attention.rows([0, "mean"]), before)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, images = build("vmamba", torch.float32)
        with record(model) as tape:
            model(images)
    assert rollout(tape).isfinite().all()


def test_blocks_need_no_matrix():
    """One block of rows of a map of 128 x 128 tokens; the matrix alone would be a gigabyte."""
    code = """
import resource, timm, torch, visionssm
from visionssm import explain
model = timm.create_model("vmamba_nano").eval()
with explain.record(model, layers=[0]) as tape, torch.no_grad():
    model(torch.zeros(1, 3, 512, 512))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert tape.attention(0).layout.tokens >= 16384
next(iter(tape.attention(0).blocks(1)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300  # MB
