"""What a dense config names: backbone, necks, a data set in memory; needs mmengine, and mmdet or mmseg to be of use."""

from .backbone import Backbone
from .necks import ResamplingNeck, SimpleFeaturePyramid
from .samples import CachedSamples

__all__ = ["Backbone", "CachedSamples", "ResamplingNeck", "SimpleFeaturePyramid"]
