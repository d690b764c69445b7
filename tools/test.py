"""Test a checkpoint: `python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--cfg-options KEY=VALUE ...]`."""

import sys

if __name__ == "__main__":
    try:
        from visionssm.engine.launch import main_test
    except ImportError as error:
        sys.exit(f"tools/test.py: {error}")
    sys.exit(main_test())
