__version__ = "0.1.0"

from capnb._lazy import lazy

lazy(__name__)  # the areas are imported when they are first asked for: `capnb.data.read_coco`
