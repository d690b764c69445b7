"""The command line: `visionssm COMMAND ...` or `python -m visionssm COMMAND ...`.

A subcommand is one function that adds its parser and one that runs it, both below; `COMMANDS` lists the former. What a subcommand
needs is imported when it runs. Exit status: 0 done; 1 one line on stderr says what is wrong; 2 wrong usage; 130 Ctrl-C.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import UserError, printable

INTERRUPTED = 130  # the shell's exit status for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the command line without the program's name; by default the process's own.

    Returns:
        The exit status.

    Raises:
        SystemExit: wrong usage (2), `--help` or `--version` (0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: complain(args, message)
            status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        complain(args, error)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; its `run` takes the parsed arguments and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="visionssm",
        description="Vision state-space models: Vim, VMamba, LocalMamba.",
        epilog="visionssm COMMAND --help says more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"visionssm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def complain(args: argparse.Namespace, error: Exception | str) -> None:
    """One line on stderr, of an error or a warning."""
    print(f"visionssm {args.command}: {printable(' '.join(str(error).split()))}", file=sys.stderr)


def _command(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1")
    return number


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 0")
    return int(text)


def _add_list(commands: Any) -> None:
    parser = _command(commands, "list", "list the models", "visionssm list 'vmamba_tiny*'")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a pattern with * and ?; default: all")
    parser.add_argument("--pretrained", action="store_true", help="the published checkpoints, NAME.TAG, in place of the models")
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    from .commands.models import checkpoint_table, model_table

    for line in (checkpoint_table if args.pretrained else model_table)(args.pattern):
        print(line, flush=True)
    return 0


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", "describe one model", "visionssm info vmamba_tiny_s1l8")
    parser.add_argument("name", metavar="NAME", help="a model's name, see visionssm list")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from .commands.models import model_page

    print(*model_page(args.name), sep="\n")
    return 0


def _add_classify(commands: Any) -> None:
    example = "visionssm classify work_dirs/vmamba-nano_digits seven.png three.jpg --out predictions.png"
    parser = _command(commands, "classify", "say what images show", example)
    parser.add_argument(
        "model",
        metavar="NAME_OR_CHECKPOINT",
        help="a model with published weights, a folder or .pth file that training wrote, or a folder by timm's save_for_hf",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="an image file")
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="classes to show per image; default: 5")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="also draw the images with their classes, e.g. as a .png")
    parser.set_defaults(run=_classify)


def _classify(args: argparse.Namespace) -> int:
    from .commands.classifier import load_classifier
    from .commands.picture import Picture

    picture = Picture(args.out, args.images) if args.out else None
    classifier = load_classifier(args.model, args.device)
    print(classifier.description, flush=True)
    status = 0
    for path in args.images:
        try:
            prediction = classifier.classify(path, args.top)
        except UserError as error:
            complain(args, error)
            status = 1
            continue
        print(f"\n{path}")
        for name, score in prediction.classes:
            print(f"  {score:6.1%}  {name}", flush=True)
        if picture:
            picture.add(prediction)
    if picture and picture.predictions:
        print(f"\n{picture.save()}")
    return status


def _add_download(commands: Any) -> None:
    example = "visionssm download vmamba_tiny_s1l8.in1k --to weights --format safetensors"
    parser = _command(commands, "download", "fetch a published checkpoint and say where it lies", example)
    parser.add_argument("name", metavar="NAME.TAG", help="a checkpoint, see visionssm list --pretrained")
    parser.add_argument("--to", type=Path, metavar="DIR", help="an existing folder to put it in; default: the download cache")
    parser.add_argument(
        "--format",
        choices=("original", "safetensors"),
        default="original",
        help="the file as published, or its weights alone under our names (then --to is . by default); default: original",
    )
    parser.set_defaults(run=_download)


def _download(args: argparse.Namespace) -> int:
    from .commands.weights import download_to

    print(download_to(args.name, args.to, args.format))
    return 0


def _add_convert(commands: Any) -> None:
    example = "visionssm convert vssm1_tiny_0230s_ckpt_epoch_264.pth --model vmamba_tiny_s1l8 -o vmamba_tiny.safetensors"
    parser = _command(commands, "convert", "write a checkpoint under our names, as safetensors", example)
    _add_checkpoint(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the .safetensors file to write")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from .commands.weights import convert_file

    print(convert_file(args.file, args.model, args.out, args.entry))
    return 0


def _add_verify(commands: Any) -> None:
    example = "visionssm verify vssm1_tiny_0230s_ckpt_epoch_264.pth --model vmamba_tiny_s1l8 --image cat.jpg"
    parser = _command(commands, "verify", "load a checkpoint, report what it holds, classify an image", example)
    _add_checkpoint(parser)
    parser.add_argument("--image", type=Path, metavar="IMAGE", help="an image to classify; default: a plain gradient")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from .commands.weights import verify_file

    for line in verify_file(args.file, args.model, args.image, args.entry):
        print(line, flush=True)
    return 0


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a published checkpoint, also a detector's or segmentor's, or one of ours"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="the model that it is of, see visionssm list")
    parser.add_argument(
        "--entry", metavar="KEY", help="the file's entry with the weights, e.g. model_ema; default: model or state_dict"
    )


def _add_explain(commands: Any) -> None:
    example = "visionssm explain work_dirs/vmamba-nano_digits seven.png -o seven_explained.png --method attribution"
    parser = _command(commands, "explain", "draw what a model looks at in images", example)
    parser.add_argument("model", metavar="NAME_OR_CHECKPOINT", help="as for visionssm classify")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="an image file")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PICTURE", help="the picture to draw, e.g. a .png")
    methods = "rollout (default), attribution, raw, gradient, gradient_x_input or integrated_gradients"
    parser.add_argument("--method", default="rollout", metavar="METHOD", help=methods)
    parser.add_argument("--class", dest="target", type=_number, metavar="N", help="the class to explain; default: predicted")
    layer = "the layer whose paths are drawn and where the method starts; -1 is the last"
    parser.add_argument("--layer", type=int, metavar="K", help=layer)
    signed = "draw rollout, raw and paths from signed attention, as in the paper; default: from its magnitudes"
    parser.add_argument("--signed", action="store_true", help=signed)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    from .commands.classifier import load_classifier
    from .commands.explain import check_method, draw_explanations, explain_image
    from .commands.picture import new_figure

    check_method(args.method)
    new_figure(args.out, args.images)
    classifier = load_classifier(args.model, args.device)
    print(classifier.description, flush=True)
    explanations, status = [], 0
    for path in args.images:
        try:
            explanations.append(explain_image(classifier, path, args.method, args.target, args.layer, args.signed))
        except UserError as error:
            complain(args, error)
            status = 1
            continue
        print(f"{path}: {explanations[-1].name}, {explanations[-1].probability:.1%}", flush=True)
    if explanations:
        draw_explanations(explanations, args.method, args.out)
        print(args.out)
    return status


def _add_erf(commands: Any) -> None:
    example = "visionssm erf vmamba_tiny_s1l8 -o erf.png"
    parser = _command(commands, "erf", "draw the effective receptive field of a model", example)
    model = "as for visionssm classify; a name without published weights gets fresh ones"
    parser.add_argument("model", metavar="NAME_OR_CHECKPOINT", help=model)
    parser.add_argument("images", nargs="*", metavar="IMAGE", type=Path, help="image files; default: noise")
    parser.add_argument("-o", "--out", type=Path, default=Path("erf.png"), metavar="PICTURE", help="default: erf.png")
    parser.add_argument("--size", type=_positive, metavar="PIXELS", help="side of the images; default: the model's own")
    parser.add_argument("--untrained", action="store_true", help="fresh weights, also where weights are published")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.set_defaults(run=_erf)


def _erf(args: argparse.Namespace) -> int:
    from .commands.explain import receptive_field

    print(*receptive_field(args.model, args.images, args.out, args.size, args.untrained, args.device), sep="\n")
    return 0


def _add_train(commands: Any) -> None:
    from .commands.training import add_train_arguments  # tools/train.py takes the same ones

    example = "visionssm train vmamba-nano_digits --work-dir runs/digits --cfg-options train_cfg.max_epochs=5"
    parser = _command(commands, "train", "train from a config", example)
    add_train_arguments(parser)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from .commands.training import needs_training

    with needs_training():
        from .engine.distributed import leave
        from .engine.launch import train
    train(args)
    return leave(0)


def _add_test(commands: Any) -> None:
    from .commands.training import add_test_arguments

    parser = _command(
        commands, "test", "test a training run's checkpoint", "visionssm test vmamba-nano_digits runs/digits/epoch_5.pth"
    )
    add_test_arguments(parser)
    parser.set_defaults(run=_test)


def _test(args: argparse.Namespace) -> int:
    from .commands.training import needs_training

    with needs_training():
        from .engine.distributed import leave
        from .engine.launch import test
    test(args)
    return leave(0)


def _add_env(commands: Any) -> None:
    parser = _command(commands, "env", "show versions, devices and which operator backends run here", "visionssm env")
    parser.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    from .commands.environment import report

    print(*report(), sep="\n")
    return 0


COMMANDS = (
    _add_list,
    _add_info,
    _add_classify,
    _add_explain,
    _add_erf,
    _add_download,
    _add_convert,
    _add_verify,
    _add_train,
    _add_test,
    _add_env,
)
