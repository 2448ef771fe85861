"""Instance segmentation with crisp boundaries."""

__version__ = "0.1.0"
