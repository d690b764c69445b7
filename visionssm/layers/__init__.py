"""Blocks that two or more model families share."""

from timm.layers import register_notrace_function

from visionssm.ops import cross_merge, cross_scan, cross_selective_scan, cross_selective_scan_packed

# torch.fx cannot trace the argument checks; as leaves the operators stay single nodes of the graph.
for _operator in (cross_merge, cross_scan, cross_selective_scan, cross_selective_scan_packed):
    register_notrace_function(_operator)
