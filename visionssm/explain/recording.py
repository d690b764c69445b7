"""Recording what the mixers of a model read: a context around a forward pass, and the tape that it fills."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visionssm.errors import UserError
from visionssm.layers.ss2d import SS2D
from visionssm.layers.vim_mixer import VimMixer
from visionssm.models.local_vim import LocalVim, LocalVimMixer
from visionssm.models.vim import VisionMamba
from visionssm.models.vmamba import VMamba

from .attention import Attention, recomputation
from .layout import Token, TokenLayout
from .operands import mixer_factors, scan_operands

NETWORKS = (VisionMamba, VMamba, LocalVim)
MIXERS = (VimMixer, SS2D, LocalVimMixer)


@dataclass
class Layer:
    """One mixer of the recorded network.

    Args:
        name: the mixer's name in the network.
        mixer: the module.
        stage: the index of its stage; 0 in a plain network.
        downsample: what leads into its stage, None before the first.
    """

    name: str
    mixer: nn.Module
    stage: int
    downsample: nn.Module | None
    inputs: tuple[Any, ...] | None = field(default=None, repr=False)
    grid: tuple[int, int] | None = None
    _autocast: tuple[bool, torch.dtype] = field(default=(False, torch.float32), repr=False)
    _versions: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    def keep(self, inputs: tuple[Any, ...], grid: tuple[int, int]) -> None:
        """Keep what the mixer was called with; nothing is copied."""
        self.inputs = tuple(m.detach() if isinstance(m, Tensor) else m for m in inputs)
        self.grid = grid
        kind = inputs[0].device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._versions = self._weight_versions()

    def attention(self, layout: TokenLayout) -> Attention:
        """The layer's attention; dt, B and C are computed again from the mixer's input."""
        inputs = self.inputs
        operands = self._again(inputs, lambda: scan_operands(self.mixer, *inputs))
        factors = functools.cache(lambda: self._again(inputs, lambda: mixer_factors(self.mixer, operands, *inputs)))
        return Attention(operands, layout, factors)

    def _again(self, inputs: tuple[Any, ...], compute: Any) -> Any:
        if self._versions != self._weight_versions():
            raise UserError(f"{self.name}: its weights have changed since it was recorded; record the model again")
        x, (enabled, dtype) = inputs[0], self._autocast
        with recomputation(x), torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
            return compute()

    def _weight_versions(self) -> tuple[tuple[int, int], ...]:
        """Changes of `p.data` are not seen, nor those of tensors made in inference mode, which count no versions."""
        return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.mixer.parameters())


class Tape:
    """What `record` has recorded: the inputs of the mixers in the last forward pass, layer by layer."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.layers = _layers(network)
        self.recorded: frozenset[int] = frozenset(range(len(self.layers)))
        self.patch_grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        filled = sum(layer.inputs is not None for layer in self.layers)
        return f"Tape({type(self.network).__name__}, {filled} of {len(self)} layers recorded)"

    @property
    def class_token(self) -> bool:
        """Whether the sequences hold a class token."""
        return getattr(self.network, "cls_token", None) is not None

    @property
    def default_token(self) -> Token:
        """What the classifier reads: "cls", or "mean" where it pools."""
        return "cls" if self.class_token and self.network.global_pool == "token" else "mean"

    @property
    def stages(self) -> list[range]:
        """The layers of every stage."""
        stages = [layer.stage for layer in self.layers]
        return [range(stages.index(s), len(stages) - stages[::-1].index(s)) for s in sorted(set(stages))]

    def layout(self, layer: int) -> TokenLayout:
        """Where the tokens of a layer lie.

        Raises:
            UserError: a layer that is not there or not recorded.
        """
        grid = self._recorded_layer(layer).grid
        # Every network of the zoo with a class token has it in the middle.
        return TokenLayout(grid, grid[0] * grid[1] // 2 if self.class_token else None)

    def attention(self, layer: int) -> Attention:
        """The attention of one layer, see `Attention`; negative numbers count from the last layer.

        Raises:
            UserError: a layer that is not there or not recorded, or whose weights have changed since.
        """
        return self._recorded_layer(layer).attention(self.layout(layer))

    def check_layer(self, layer: int) -> int:
        """`layer` as an index from 0.

        Raises:
            UserError: there is no such layer.
        """
        count = len(self.layers)
        if type(layer) is not int or not -count <= layer < count:
            raise UserError(f"layer: got {layer!r}, expected 0 to {count - 1} (or -{count} to -1); the model has {count} layers")
        return layer % count

    def _recorded_layer(self, index: int) -> Layer:
        index = self.check_layer(index)
        if index not in self.recorded:
            raise UserError(f"layer: {index} is not among the recorded ones; add it to layers= of record")
        if self.layers[index].inputs is None:
            if any(layer.inputs is not None for layer in self.layers):
                raise UserError(f"layer: {index} did not run in the last forward pass")
            raise UserError(
                "tape: nothing is recorded; call the model inside `with record(model) as tape:`, not through a compiled function"
            )
        return self.layers[index]


@contextlib.contextmanager
def record(model: nn.Module, layers: str | Sequence[int] = "all") -> Iterator[Tape]:
    """Record what the model's scans read while it runs inside the context; its outputs do not change.

    Only the input of every mixer is kept (no copy, O(L D) a layer); dt, B, C and the gate are computed again when asked for.
    A further forward pass replaces the recording. Outside the context nothing is left in the model.

    Args:
        model: a model of the zoo, or a module that holds one, such as a training wrapper.
        layers: "all", or the numbers of the layers to record.

    Yields:
        The tape, of use after the context as well.

    Raises:
        UserError: no or several models of the zoo in `model`, a compiled model, an unknown layer.
    """
    _check_eager(model)
    networks = [module for module in model.modules() if isinstance(module, NETWORKS)]
    if len(networks) != 1:
        found = ", ".join(type(network).__name__ for network in networks) or "none"
        raise UserError(f"model: expected a {type(model).__name__} with one network of the zoo inside, found {found}")
    tape = Tape(networks[0])
    if not isinstance(layers, str) or layers != "all":
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise UserError(f'layers: got {layers!r}, expected "all" or a list of layer numbers')
        tape.recorded = frozenset(tape.check_layer(layer) for layer in layers)
    with contextlib.ExitStack() as stack:
        embed = tape.network.patch_embed.register_forward_hook(lambda module, args, output: _begin(tape, output))
        stack.callback(embed.remove)
        for index in tape.recorded:
            layer = tape.layers[index]
            hook = layer.mixer.register_forward_pre_hook(functools.partial(_keep_inputs, tape, layer))
            stack.callback(hook.remove)
        yield tape


def _begin(tape: Tape, patches: Tensor) -> None:
    """A forward pass replaces the whole recording, also where it ends early."""
    tape.patch_grid = tuple(patches.shape[1:3])
    for layer in tape.layers:
        layer.inputs = None


def _keep_inputs(tape: Tape, layer: Layer, mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
    grid = tuple(inputs[0].shape[1:3]) if isinstance(mixer, SS2D) else tape.patch_grid
    layer.keep(inputs, grid)


def _check_eager(model: nn.Module) -> None:
    """A compiled graph runs no hooks."""
    advice = "record the model before torch.compile, or pass the one that was compiled"
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UserError(f"model: a compiled model cannot be recorded: {advice}: record(model._orig_mod)")
    if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise UserError(f"model: a {type(model).__name__} cannot be recorded; pass the model that it was made from")
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise UserError(f"model: {name or 'the model'} is compiled, and a compiled graph cannot be recorded; {advice}")


def _layers(network: nn.Module) -> list[Layer]:
    """The mixers of a network of the zoo in the order of its forward pass."""
    layers = []
    for stage, part in enumerate(network.layers if isinstance(network, VMamba) else [network]):
        downsample = part.downsample if isinstance(network, VMamba) and stage > 0 else None
        prefix = f"layers.{stage}." if isinstance(network, VMamba) else ""
        layers += [
            Layer(prefix + name, module, stage, downsample) for name, module in part.named_modules() if isinstance(module, MIXERS)
        ]
    return layers
