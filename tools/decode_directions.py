"""From a search for scan directions to a config that trains what it has found.

Usage: python tools/decode_directions.py CHECKPOINT RECIPE -o FOUND.py, then python tools/train.py FOUND.py
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from visionssm import config_path
from visionssm.errors import UserError
from visionssm.weights import read_checkpoint, select_weights

if __name__ == "__main__":
    parser = ArgumentParser(description="Write a config with the scan directions that a search has found.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth file of a training with visionssm.DirectionSearch")
    parser.add_argument("recipe", metavar="RECIPE", help="the config to train them with, see visionssm train")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOUND.py", help="the config to write")
    args = parser.parse_args()
    try:
        from visionssm.engine.search import decode_directions

        directions = decode_directions(select_weights(read_checkpoint(args.checkpoint)))
        lines = [f"_base_ = {str(config_path(args.recipe).resolve())!r}", "", "paths = ("]
        lines += [*(f"    {names!r}," for names in directions), ")", "model = dict(backbone=dict(paths=paths))", ""]
        args.out.write_text("\n".join(lines), encoding="utf-8")
    except (UserError, OSError, ImportError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    for number, names in enumerate(directions):
        print(f"layer {number:2}: {' '.join(names)}")
    print(args.out)
