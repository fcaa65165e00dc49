"""FSC-CLIP (arXiv 2410.05210): fine-grained hard negatives for any dual encoder, without forgetting."""
from capnb._lazy import lazy

lazy(__name__,
     global_loss="clip_loss calibrated_loss global_hard_negative_loss",
     local_loss="local_similarity direct_local_loss",
     fused="local_hard_negative_loss",
     gather="gather_rows gathered_clip_loss",
     objective="fsc_clip_loss fsc_clip_terms FSCClip collate_negatives",
     negatives="HardNegatives StoredNegatives WithNegatives precompute read_negatives",
     swap="Negative",
     plausible="NGrams Plausible",
     cached="Cached",
     tuning="DualFull DualLora TextOnly",
     baselines="NegCLIP CECLIP GNMCLIP TSVLC collate_group objective_named",
     recipe="recipe finetune choose_alpha",
     items="Item Items score_items",
     zero_shot="classify retrieve",
     suite="clip_suite",
     forgetting="forgetting_report",
     text_sets="read_sugarcrepe read_aro_vg read_aro_order read_valse read_vl_checklist read_whatsup read_crepe",
     image_sets="read_winoground read_eqben read_spec read_svo read_imagecode comp score_sets",
     real_sets="score_classes load_classes read_coco_counterfactuals")
