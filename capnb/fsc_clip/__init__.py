"""FSC-CLIP (arXiv 2410.05210): fine-grained hard negatives for any dual encoder, without forgetting."""
from capnb._lazy import lazy

lazy(__name__,
     global_loss="clip_loss calibrated_loss global_hard_negative_loss",
     local_loss="local_similarity direct_local_loss",
     fused="local_hard_negative_loss",
     gather="gather_rows gathered_clip_loss",
     objective="fsc_clip_loss fsc_clip_terms FSCClip collate_negatives")
