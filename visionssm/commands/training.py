"""The arguments of `visionssm train` and `visionssm test`, which tools/train.py and tools/test.py take too; light to import."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from visionssm.errors import UserError

_TESTED = (
    "a .pth file that training wrote, or a .safetensors file of `visionssm convert`; of a classifier also a published name, as in "
    "`visionssm list --pretrained`, or a file of its weights"
)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def add_train_arguments(parser: ArgumentParser) -> None:
    """What training takes."""
    _add_common_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work directory")
    parser.add_argument("--amp", action="store_true", help="mixed precision: the config's optim_wrapper.dtype, or bfloat16")
    add_compile_arguments(parser)


def add_compile_arguments(parser: ArgumentParser) -> None:
    """Whether and how the backbone is compiled; `compile_mode` says it all once they are parsed."""
    parser.add_argument("--compile", action="store_true", help="run the backbone through torch.compile")
    parser.add_argument(
        "--compile-mode",
        choices=COMPILE_MODES,
        help="the same in another of its modes: reduce-overhead records CUDA graphs, which spares the launches of small kernels",
    )


def compile_mode(args: Namespace) -> str | None:
    """The mode for `torch.compile`, or None where nothing is compiled."""
    return args.compile_mode or ("default" if args.compile else None)


def add_test_arguments(parser: ArgumentParser) -> None:
    """What a test takes."""
    _add_common_arguments(parser)
    parser.add_argument("checkpoint", help=_TESTED)
    parser.add_argument("--tta", action="store_true", help="average the scores of every image and its mirror image")


def _add_common_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of one that the package ships")
    parser.add_argument("--work-dir", metavar="DIR", help="folder for checkpoints and logs; default: work_dirs/<config name>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changes to the config, e.g. train_cfg.max_epochs=5",
    )


@contextmanager
def needs_training() -> Iterator[None]:
    """Around the import of what trains.

    Raises:
        UserError: mmengine or another package of the extra [train] is missing.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(str(error)) from error
