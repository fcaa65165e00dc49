"""Words and scene graphs: the graph of a caption, its parser, synonyms, and the nearest captions."""
from capnb._lazy import lazy

lazy(__name__,
     words="sanitize words",
     graph="SceneGraph Node Edge draw_graph",
     synonyms="Synonyms",
     ptb="ptb_tokens",
     parse="parse",
     factual="read_factual grade",
     nearest="bm25 tuple_overlap")
