"""Metrics: captions against references, with intervals and paired comparisons; studies with people."""
from capnb._lazy import lazy

lazy(__name__,
     scores="score_captions Scores compare METRICS",
     slices="sliced compare_slices changed by_length by_object by_domain",
     style_match="style_distance",
     significance="bootstrap paired_bootstrap permutation_test holm",
     cider="document_frequencies DocFreq",
     clip_score="retrieval",
     human="pairwise likert contrastive read_answers Study Question",
     raters="krippendorff_alpha summary simulate_raters",
     agreement="human_agreement kendall_tau")
