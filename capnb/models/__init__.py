"""Models: captioners and their families, and the small ones that ship with the package."""
from capnb._lazy import lazy

lazy(__name__,
     captioner="Captioner Template",
     llava="LlavaCaptioner",
     generic="HFCaptioner",
     load="load_captioner BASES",
     mapper="Mapper",
     smol="SmolCaptioner load_smol")
