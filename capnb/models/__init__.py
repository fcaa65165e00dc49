"""Models: captioners and their families, and the small ones that ship with the package."""
from capnb._lazy import lazy

lazy(__name__,
     captioner="Captioner load_captioner BASES")
