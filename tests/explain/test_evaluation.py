"""Scores on problems whose answers are known, the gradient baselines, the receptive field, pictures."""

import sys

import pytest
import timm
import torch
from PIL import Image
from small_models import build
from torch import nn
from torch.testing import assert_close

from visionssm import explain
from visionssm.errors import UserError
from visionssm.explain.evaluation import average_precision, scaled, to_size
from visionssm.explain.gradients import GRADIENT_METHODS
from visionssm.explain.picture import unnormalised


class Brightness(nn.Module):
    """Class 1 as long as any of the left two pixels of a 1 x 10 image is not masked."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        seen = images[:, 0, 0, :2].abs().sum(1)
        return torch.stack([torch.full_like(seen, 0.5), seen], dim=1)


class Squared(nn.Module):
    """Logits (w x)^2, whose integrated gradients from 0 are (w x) w x."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def terms(self, images):
        return (images.flatten(1) @ self.weight.detach().mT)[..., None, None, None]

    def forward(self, images):
        return (images.flatten(1) @ self.weight.mT).square()


def left_first(model, images, target):
    return -torch.arange(10.0).expand(len(images), 1, 10)


LOADER = [(torch.ones(2, 3, 1, 10), torch.tensor([1, 1])), (torch.ones(1, 3, 1, 10), torch.tensor([0]))]


def test_perturbation():
    positive = explain.perturbation_auc(Brightness(), LOADER, left_first)
    assert_close(torch.tensor(positive.accuracy), torch.tensor([2 / 3, *[1 / 3] * 8]))  # the third image is right once all is gone
    assert positive.auc == pytest.approx((0.5 + 7 / 3) / 8)
    negative = explain.perturbation_auc(Brightness(), LOADER, left_first, mode="negative")
    assert negative.accuracy == pytest.approx((2 / 3,) * 9)
    assert negative.auc == pytest.approx(2 / 3)
    filled = explain.perturbation_auc(Brightness(), LOADER, left_first, fill=1.0)
    assert filled.accuracy == pytest.approx((2 / 3,) * 9)


def test_which_class_is_explained():
    seen = []

    def method(model, images, target):
        seen.append(target)
        return left_first(model, images, target)

    explain.perturbation_auc(Brightness(), LOADER, method)
    explain.perturbation_auc(Brightness(), LOADER, method, explained="label")
    assert seen[:2] == [None, None]
    assert torch.equal(seen[2], LOADER[0][1])


def test_segmentation():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)[:, None]
    maps = torch.tensor([[4.0, 1.0, 3.0, 0.0], [5.0, 5.0, 5.0, 9.0]])[:, None]  # found: 1 0 1 0 and 0 0 0 1
    scores = explain.segmentation_scores(Brightness(), [(torch.ones(2, 3, 1, 4), masks)], lambda *_: maps)
    assert scores.pixel_accuracy == pytest.approx(6 / 8)
    assert scores.mean_iou == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert scores.mean_ap == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_average_precision_agrees_with_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = torch.rand(3, 50), torch.rand(3, 50) < 0.3
    expected = [metrics.average_precision_score(p, s) for p, s in zip(positive, scores, strict=True)]
    assert_close(average_precision(scores, positive), torch.tensor(expected, dtype=torch.float32))


def test_ties_in_average_precision():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = torch.randint(0, 4, (5, 60)).float(), torch.rand(5, 60) < 0.4
    expected = [metrics.average_precision_score(p, s) for p, s in zip(positive, scores, strict=True)]
    assert_close(average_precision(scores, positive), torch.tensor(expected, dtype=torch.float32))
    nothing = average_precision(torch.zeros(1, 4), torch.tensor([[True, False, False, False]]))
    assert nothing.item() == 0.25  # not 1, though the object comes first in the raster


def test_ties_in_a_perturbation():
    """A map that says nothing masks the left two pixels first for no more than its share of many images; equals stay together."""
    loader = [(torch.ones(400, 3, 1, 10), torch.ones(400, dtype=torch.long))]
    flat = explain.perturbation_auc(Brightness(), loader, lambda model, images, target: torch.zeros(len(images), 1, 10))
    expected = [1 - masked * (masked - 1) / 90 for masked in range(1, 10)]  # not both of two among ten
    assert flat.accuracy == pytest.approx(expected, abs=0.07)
    halves = (torch.arange(10) < 5).float().expand(400, 1, 10)
    positive, negative = (
        explain.perturbation_auc(Brightness(), loader, lambda model, images, target: halves, mode=mode).accuracy
        for mode in ("positive", "negative")
    )
    assert positive[4:] == (0.0,) * 5
    assert 0 < positive[3] < positive[1] < positive[0] == 1
    assert negative[:6] == (1.0,) * 6
    split = [(images[i : i + 150], labels[i : i + 150]) for images, labels in loader for i in range(0, 400, 150)]
    again = explain.perturbation_auc(Brightness(), split, lambda model, images, target: torch.zeros(len(images), 1, 10))
    assert again == flat


def test_half_precision_maps():
    """More pixels than bfloat16 can count."""
    images, masks = torch.ones(1, 3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.bool)
    masks[:, :30] = True
    maps = torch.rand(1, 40, 40).bfloat16()
    half, single = (explain.segmentation_scores(Brightness(), [(images, masks)], lambda *_, m=m: m) for m in (maps, maps.float()))
    assert half == single
    assert 0.7 < half.mean_ap < 0.8


def test_scales():
    maps = torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]])
    assert_close(scaled(maps), torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]))
    assert to_size(maps, (1, 2)) is maps
    assert_close(to_size(maps, (2, 2))[0], torch.tensor([[1.0, 3.0], [1.0, 3.0]]))


@pytest.mark.parametrize("method", explain.METHODS)
def test_every_method_gives_maps(kind, method):
    if method in GRADIENT_METHODS:
        pytest.importorskip("captum")
    model, images = build(kind, torch.float32)
    maps = explain.METHODS[method](model, images, None)
    assert maps.dim() == 3
    assert maps.isfinite().all()
    assert maps.std() > 0
    assert not maps.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_bad_evaluations():
    masks = torch.zeros(2, 1, 10, dtype=torch.bool)
    for call, message in (
        (lambda: explain.perturbation_auc(Brightness(), LOADER, "rolout"), "method: got 'rolout'.*did you mean rollout"),
        (lambda: explain.perturbation_auc(Brightness(), LOADER, left_first, mode="up"), "mode: got 'up', expected positive or"),
        (lambda: explain.perturbation_auc(Brightness(), LOADER, left_first, explained="all"), "explained: got 'all'"),
        (lambda: explain.perturbation_auc(Brightness(), [], left_first), "loader: gave no images"),
        (
            lambda: explain.perturbation_auc(Brightness(), [(LOADER[0][0], LOADER[0][1][:, None])], left_first),
            r"loader: expected labels \(2,\), one for each image, got \(2, 1\)",
        ),
        *(
            (
                lambda wrong=wrong: explain.perturbation_auc(Brightness(), [(LOADER[0][0], torch.tensor([0, wrong]))], left_first),
                f"loader: got labels from {min(0, wrong)} to {max(0, wrong)}, expected 0 to 1",
            )
            for wrong in (2, -1)
        ),
        (lambda: explain.segmentation_scores(Brightness(), [], left_first), "loader: gave no images"),
        (lambda: explain.segmentation_scores(Brightness(), LOADER, left_first), r"loader: expected masks \(2, 1, 10\) of bool"),
        (
            lambda: explain.segmentation_scores(Brightness(), [(LOADER[0][0], masks)], left_first),
            "loader: gave a mask without object or without background",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_gradient_baselines():
    """Gradient x input of a linear model is its terms; of a quadratic one twice the integrated gradients."""
    pytest.importorskip("captum")
    weight = torch.randn(3, 3 * 4 * 5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3, bias=False))
    model[1].weight.data.copy_(weight)
    images = torch.randn(2, 3, 4, 5)
    expected = (weight[1].view(3, 4, 5) * images).sum(1)
    assert_close(explain.gradients(model, images, 1), expected)
    assert_close(
        explain.gradients(model, images, torch.tensor([1, 1]), "gradient"), weight[1].view(3, 4, 5).abs().sum(0).expand(2, -1, -1)
    )
    squared = Squared(weight)
    expected = 2 * squared.terms(images)[:, 2] * weight[2].view(3, 4, 5) * images
    assert_close(explain.gradients(squared, images, 2), expected.sum(1))
    expected = squared.terms(images)[:, 2] * weight[2].view(3, 4, 5) * images
    assert_close(explain.gradients(squared, images, 2, "integrated_gradients"), expected.sum(1))


def test_integrated_gradients_of_many_images():
    pytest.importorskip("captum")
    images, model = torch.randn(70, 1, 1, 6), Squared(torch.randn(3, 6))
    together = explain.gradients(model, images, 1, "integrated_gradients")  # captum's warning would be an error
    assert_close(together[:3], explain.gradients(model, images[:3], 1, "integrated_gradients"))


def test_gradients_refuse(monkeypatch):
    model, images = build("vim", torch.float32)
    with pytest.raises(UserError, match="method: got 'lime', expected one of gradient, gradient_x_input"):
        explain.gradients(model, images, method="lime")
    with pytest.raises(UserError, match="target: class 5 is out of range"):
        explain.gradients(model, images, 5)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(UserError, match=r"gradient_x_input needs captum: pip install 'visionssm\[explain\]'"):
        explain.gradients(model, images)


def test_receptive_field(kind):
    model, images = build(kind, torch.float32)
    field = explain.effective_receptive_field(model, images)
    assert field.shape == images.shape[-2:]
    assert field.max() == 1.0
    assert field.min() >= 0.0
    assert not field.requires_grad
    feature = model.forward_intermediates(images, indices=1, intermediates_only=True)[0]
    height, width = feature.shape[-2:]
    moved = images.clone()
    peak = divmod(int(field.argmax()), field.shape[1])
    moved[:, :, peak[0], peak[1]] += 0.1
    change = model.forward_intermediates(moved, indices=1, intermediates_only=True)[0] - feature
    assert change[:, :, height // 2, width // 2].abs().max() > 0
    with pytest.raises(UserError, match="expected a network of the zoo, got Linear"):
        explain.effective_receptive_field(nn.Linear(1, 1), images)


def test_receptive_field_of_a_convolution_net_is_local():
    """A model that only downsamples: the field is the windows' own."""
    model = timm.create_model("vmamba_nano", depths=(0, 0), embed_dim=(8, 8), num_classes=0).eval()
    field = explain.effective_receptive_field(model, torch.randn(2, 3, 65, 65))
    rows = field.any(1).nonzero()[:, 0]
    assert 33 - 8 <= rows.min() <= rows.max() <= 33 + 8


def test_receptive_field_of_an_even_grid_has_its_centre_in_the_middle():
    """A model whose tokens do not mix: the central 2 x 2 of 8 x 8 patches, or the central 1 x 2 of 7 x 8."""
    model = timm.create_model("vim_nano", depth=1, num_classes=0).eval()
    side = model.patch_embed.patch_size
    torch.nn.init.zeros_(model.layers[0].mixer.out_proj.weight)
    for rows in (8, 7):
        field = explain.effective_receptive_field(model, torch.randn(2, 3, rows * side, 8 * side))
        expected = torch.zeros(rows, 8, dtype=torch.bool)
        expected[(rows - 1) // 2 : rows // 2 + 1, 3:5] = True
        assert torch.equal(field > 0, expected.repeat_interleave(side, 0).repeat_interleave(side, 1))


def test_overlay():
    pytest.importorskip("matplotlib")
    image = Image.new("L", (8, 4), 255)
    heat = torch.zeros(2, 4)
    heat[0, 3] = 1.0
    blended = explain.overlay(image, heat, strength=1.0)
    assert (blended.size, blended.mode) == ((8, 4), "RGB")
    assert sum(blended.getpixel((7, 0))) > 500 > 100 > sum(blended.getpixel((0, 3)))
    assert explain.overlay(image, heat, strength=0.0).getpixel((0, 0)) == (255, 255, 255)
    axes = explain.show(image, heat, title="a")
    assert axes.get_title() == "a"
    for bad in (torch.zeros(2), torch.full((2, 2), float("nan"))):
        with pytest.raises(UserError, match="heat: expected a finite map"):
            explain.overlay(image, bad)


def test_pictures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'visionssm\[explain\]'"):
        explain.overlay(Image.new("L", (8, 4)), torch.zeros(2, 2))


def test_unnormalised():
    pixels = torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1)
    assert unnormalised(pixels, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)).getpixel((0, 0)) == (128, 255, 0)
    assert unnormalised(pixels[:1], (0.5,), (0.5,)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    "maps", [torch.ones(1, 5, 5), torch.ones(7, 1, 5, 5), torch.full((7, 5, 5), float("nan"))], ids=["one", "4-d", "nan"]
)
def test_maps_that_are_no_maps_of_the_images(maps):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)).eval()
    images, labels = torch.randn(7, 3, 5, 5), torch.zeros(7, dtype=torch.long)
    masks = torch.zeros(7, 5, 5, dtype=torch.bool)
    masks[:, :2] = True
    with pytest.raises(UserError, match="method: gave"):
        explain.perturbation_auc(model, [(images, labels)], lambda model, images, target: maps)
    with pytest.raises(UserError, match="method: gave"):
        explain.segmentation_scores(model, [(images, masks)], lambda model, images, target: maps)
