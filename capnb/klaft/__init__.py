"""KLAFT: mapping layer, modified attention, topic control and their objectives; importing it makes TCM a method of peft."""
from capnb._lazy import lazy

lazy(__name__,
     mixture="topic_hidden naive_log_probs mixture_log_probs hidden_mixture", fused="mixture_nll",
     topics="TopicControl TopicMap init_topics topic_share topic_shares topic_map topic_words",
     mapping="MappingLayer RegionFeatures region_features",
     masks="dependent_mask independent_mask combined_masks leaks",
     mam="ModifiedAttention",
     ttm="ttm_loss drop_tokens", mrm="mrm_loss mask_regions RegionHead", itm="itm_loss ClsTokens",
     total="total_loss Weights",
     objective="klaft_objective",
     trunk="trunk_of",
     peft_tcm="TCMConfig",
     method="Tcm",
     lift="log_odds target_words target_share lift_gain supported replacements word_distance",
     topic_page="topic_page add_topics topic_map_html",
     klaft_method="Klaft",
     captioner="KLAFTCaptioner load_klaft")

import capnb.klaft.peft_tcm  # registers TCM with peft
