"""Train a model: `python tools/train.py CONFIG [--work-dir DIR] [--resume] [--amp] [--cfg-options KEY=VALUE ...]`."""

import sys

if __name__ == "__main__":
    try:
        from visionssm.engine.launch import main_train
    except ImportError as error:
        sys.exit(f"tools/train.py: {error}")
    sys.exit(main_train())
