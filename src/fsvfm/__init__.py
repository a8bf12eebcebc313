"""FS-VFM: face-security foundation models (arXiv 2510.10663, extending FSFM, arXiv 2412.12032)."""

__version__ = "0.1.0"
