"""Training recipes in mmengine's `_base_` style; the file name is the recipe. Shipped in the wheel as `visionssm.configs`."""
