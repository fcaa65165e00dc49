"""Metrics: captions against references, with intervals and paired comparisons."""
from capnb._lazy import lazy

lazy(__name__,
     scores="score_captions Scores compare METRICS",
     slices="sliced compare_slices changed by_length by_object by_domain",
     clip_score="retrieval",
     significance="bootstrap paired_bootstrap permutation_test holm")
