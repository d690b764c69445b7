"""What a detection or segmentation config names: backbone and necks; needs mmengine, and mmdet or mmseg to be of use."""

from .backbone import Backbone
from .necks import ResamplingNeck, SimpleFeaturePyramid

__all__ = ["Backbone", "ResamplingNeck", "SimpleFeaturePyramid"]
