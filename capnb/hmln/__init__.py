"""HMLN (arXiv 2503.13847): trace a caption to the training examples that explain it, exactly and fast."""
from capnb._lazy import lazy

lazy(__name__,
     atoms="mentions similarity Words Vectors Vocabulary",
     visual="soft_greater soft_equal EncoderTerms InstanceTerms TruthTerms",
     templates="TEMPLATES COMBINE features",
     retrieval="Index",
     network="GroundNetwork MapResult LogZ Marginals enumerate_states",
     fast="eliminated with_weights",
     milp="Visual abduce",
     gibbs="anneal gibbs importance",
     draw="draw",
     ground="Ground ground",
     likelihood="Features Learned learn",
     divergence="cd_gradient",
     caption_weights="learn_weights",
     questions="statement answer_atoms",
     attribute="attribute CaptionAttribution Phrase Trace",
     rivals="by_captions by_images by_chance membership neighbours",
     gradients="tracin trak",
     benchmark="benchmark",
     explain="explain ExplainPage Explainer",
     page="explain_page")
