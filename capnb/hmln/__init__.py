"""HMLN (arXiv 2503.13847): trace a caption to the training examples that explain it, exactly and fast."""
from capnb._lazy import lazy

lazy(__name__,
     network="GroundNetwork MapResult LogZ Marginals enumerate_states",
     fast="eliminated with_weights",
     milp="Visual abduce",
     gibbs="anneal gibbs importance",
     draw="draw")
