"""The effective receptive field: which pixels move the features in the middle of the last map."""

import torch
from torch import Tensor, nn

from visionssm.errors import UserError

from .recording import NETWORKS


def effective_receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """The magnitude of the gradient of the central feature with respect to every pixel, averaged over the images.

    Along an even side of the map the centre lies between two positions and their mean is taken, so that the field is not shifted.

    Source: Luo et al. (arXiv 1701.04128); VMamba (arXiv 2401.10166, figure 6) shows it before and after training.

    Args:
        model: a model of the zoo.
        images: `(batch, channels, H, W)`; noise will do.

    Returns:
        `(H, W)`, summed over the channels of the image and the feature, its largest value 1.

    Raises:
        UserError: no model of the zoo, or one whose gradient is 0 or not finite.
    """
    if not isinstance(model, NETWORKS):
        advice = "; pass the model that was compiled" if isinstance(model, torch._dynamo.OptimizedModule) else ""
        raise UserError(f"model: expected a network of the zoo, got {type(model).__name__}{advice}")
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        (feature,) = model.forward_intermediates(images, indices=1, intermediates_only=True)  # [B, C, h, w]
        rows, columns = (slice((side - 1) // 2, side // 2 + 1) for side in feature.shape[-2:])
        (gradient,) = torch.autograd.grad(feature[:, :, rows, columns].mean((2, 3)).sum(), images)
    field = gradient.float().abs().sum(1).mean(0)
    if not field.isfinite().all() or not field.any():
        raise UserError("model: the gradient of its central feature is 0 or not finite; its weights may be broken")
    return field / field.max().clamp_min(torch.finfo(field.dtype).tiny)
