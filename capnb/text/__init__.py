"""Words and scene graphs: the graph of a caption, its parser, and the nearest captions."""
from capnb._lazy import lazy

lazy(__name__,
     words="sanitize words",
     graph="SceneGraph Node Edge",
     parse="parse",
     nearest="bm25 tuple_overlap")
