"""The operator behind every model of the zoo: selective scan along 2-D scan paths. README.md beside this has the mathematics."""

from . import library as library
from .api import (
    cross_merge,
    cross_merge_ref,
    cross_scan,
    cross_scan_ref,
    cross_selective_scan,
    cross_selective_scan_packed,
    cross_selective_scan_ref,
    selective_scan,
    selective_scan_ref,
)
from .paths import BIDIRECTIONAL, CROSS, LOCAL, ScanPaths

__all__ = [
    "BIDIRECTIONAL",
    "CROSS",
    "LOCAL",
    "ScanPaths",
    "cross_merge",
    "cross_merge_ref",
    "cross_scan",
    "cross_scan_ref",
    "cross_selective_scan",
    "cross_selective_scan_packed",
    "cross_selective_scan_ref",
    "selective_scan",
    "selective_scan_ref",
]
