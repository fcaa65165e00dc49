"""Metrics: captions against references, with intervals and paired comparisons."""
from capnb._lazy import lazy

lazy(__name__,
     scores="score_captions Scores compare METRICS")
