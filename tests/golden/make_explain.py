"""Extract the golden file of hidden attention from a folder of reference outputs: `python tests/golden/make_explain.py FOLDER`.

FOLDER holds vim/vim_tiny_attention.npz, recorded in float64 from Vim-Ti with the weights and images of fill.py. Channel means of
the class token's rows and the class row of the rollout are kept whole, single channels and the matrix as digests (ops_golden.py).
"""

import sys
from pathlib import Path

import numpy as np
from ops_golden import digest


def main() -> None:
    out = Path(__file__).parent / "vim_tiny_attention.npz"
    with np.load(Path(sys.argv[1], "vim/vim_tiny_attention.npz")) as archive:
        whole = {key: archive[key] for key in archive.files if key.endswith(("cls_row_mean", "rollout_sum"))}
        digests = {f"{key}~": digest(archive[key]) for key in archive.files if key not in whole}
    np.savez_compressed(out, **whole, **digests)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
