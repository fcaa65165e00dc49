"""Models: captioners and their families, dual encoders, classical captioners, and the small ones that ship with the package."""
from capnb._lazy import lazy

lazy(__name__,
     captioner="Captioner Template",
     llava="LlavaCaptioner",
     generic="HFCaptioner",
     cross="CrossCaptioner Pair",
     points="POINTS find_points inject points_that_act",
     load="load_captioner BASES",
     families="tiny_family family_battery family_table full_size",
     dual="DualEncoder DualOutput clip_loss",
     dual_load="load_dual_encoder DUAL_BASES",
     features="FeatureCaptioner CLASSICAL load_classical caption_tokenizer",
     transformer="build_transformer",
     attention_on_attention="build_attention_on_attention",
     meshed_memory="build_meshed_memory",
     clipcap="build_clipcap",
     visualgpt="build_visualgpt srau",
     mapper="Mapper",
     smol="SmolCaptioner load_smol",
     pipclip="load_pipclip")
