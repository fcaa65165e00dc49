"""Personalize (arXiv 2412.03665): what every way to adapt a captioner gains, and what it forgets."""
from capnb._lazy import lazy

lazy(__name__)
