"""LocalMamba's search for the scan directions of every layer: a super-net, and what it has found.

Source: LocalMamba (arXiv 2403.09338). All eight directions run in every layer; how much each counts is learned with the other
weights, and the four that count most make the network that is then trained from scratch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from visionssm.errors import UserError
from visionssm.layers.local_mixer import BiAttn
from visionssm.registry import HOOKS, MODELS

from .classifier import ImageClassifier, create_backbone
from .distributed import unwrapped

DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
_KEY = "direction_weights"


class WeightedBiAttn(BiAttn):
    """BiAttn, then a sum of the normalised directions that is weighted by a softmax; `(batch, K, ..., dim)` -> `(batch, ..., dim)`.

    Args:
        attn: what it takes its layers from.
        directions: K.
    """

    def __init__(self, attn: BiAttn, directions: int) -> None:
        nn.Module.__init__(self)
        self.norm, self.global_reduce, self.channel_select = attn.norm, attn.global_reduce, attn.channel_select
        self.direction_weights = nn.Parameter(1e-3 * torch.randn(directions, 1, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        flat = y.flatten(2, -2)  # [B, K, positions, C]
        flat = F.layer_norm(flat * self.weights(flat).to(flat.dtype), flat.shape[-1:], eps=1e-5)
        shares = self.direction_weights.softmax(0).squeeze(-1)  # [K, 1, 1]
        return (shares.to(flat.dtype) * flat).sum(1).reshape(y[:, 0].shape)


@MODELS.register_module()
class DirectionSearch(ImageClassifier):
    """A LocalVim or LocalVMamba super-net as a classifier: all `DIRECTIONS` in every layer.

    Args:
        backbone: `model_name` and further arguments of the model, such as narrower widths; `paths` is set here.
        **kwargs: as `ImageClassifier`.

    Raises:
        UserError: a model without searched directions.
    """

    def __init__(self, backbone: Mapping[str, Any], **kwargs: Any) -> None:
        with torch.device("meta"):
            layers = sum(isinstance(module, BiAttn) for module in create_backbone(**backbone).modules())
        if not layers:
            raise UserError(f"model.backbone.model_name: {backbone['model_name']} has no directions to search for")
        super().__init__({**backbone, "paths": (DIRECTIONS,) * layers}, **kwargs)
        for module in list(self.backbone.modules()):
            for name, child in module.named_children():
                if isinstance(child, BiAttn):
                    setattr(module, name, WeightedBiAttn(child, len(DIRECTIONS)))


@HOOKS.register_module()
class DirectionsHook(Hook):
    """Logs every direction's share in every layer of a `DirectionSearch`: to the scalars, TensorBoard too, and to the log file.

    Args:
        interval: iterations between two entries; the published search has 200.
    """

    def __init__(self, interval: int = 200) -> None:
        self.interval = interval

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Write an entry, if it is time."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        layers = [module for module in unwrapped(runner.model).modules() if isinstance(module, WeightedBiAttn)]
        weights = torch.stack([layer.direction_weights.detach().flatten() for layer in layers])
        shares = [dict(zip(DIRECTIONS, row, strict=True)) for row in weights.softmax(1).tolist()]
        scalars = {f"directions/{number}/{name}": share for number, row in enumerate(shares) for name, share in row.items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        for number, row in enumerate(shares):
            runner.logger.info(f"layer {number}: {', '.join(f'{name} {share:.3f}' for name, share in row.items())}")


def decode_directions(state_dict: Mapping[str, Tensor], keep: int = 4) -> list[tuple[str, ...]]:
    """The directions that count most in every layer, in the order of `DIRECTIONS`.

    Args:
        state_dict: of a `DirectionSearch`.
        keep: directions of a layer.

    Raises:
        UserError: the state dict of another model.
    """
    layers = [value.flatten() for name, value in state_dict.items() if name.endswith(f".{_KEY}")]
    if not layers:
        raise UserError("checkpoint: not of a direction search: it has no direction weights")
    return [tuple(DIRECTIONS[index] for index in sorted(weights.topk(keep).indices.tolist())) for weights in layers]
