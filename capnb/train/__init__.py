"""Training: the loop and its checkpoints, and the recipes of the shipped models."""
from capnb._lazy import lazy

lazy(__name__,
     config="TrainConfig",
     loop="train stop_training Interrupted",
     objective="caption_loss",
     callback="CaptionEval",
     mixing="Rehearsal hold_back CaptionLoss",
     classical_peers="run_peer",
     clip_tiny_probes="score_dual",
     sibling_recipe="score_sibling make_sibling")
