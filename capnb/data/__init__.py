"""Captioned images: records, readers, and Scenes, a generator of images with known truth."""
from capnb._lazy import lazy

lazy(__name__,
     records="Record CaptionDataset",
     coco="read_coco read_instances",
     folder="read_folder",
     load="load_data READERS",
     pairs="Pairs",
     scenes="Scenes",
     scene_oracle="read_caption Reading",
     scene_facts="plant Planted Fact",
     karpathy="read_karpathy", nocaps="read_nocaps", textcaps="read_textcaps", vizwiz="read_vizwiz", flickr="read_flickr",
     conceptual="read_conceptual", hub="read_hub read_tables", build="RecordBuilder", look="data_statistics data_page")
