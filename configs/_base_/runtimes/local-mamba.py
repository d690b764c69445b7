# As VMamba's, but for the seed. The published config has the average off, the paper says that 0.9999 was used: chosen, on.
_base_ = "vmamba.py"

randomness = dict(seed=42)
