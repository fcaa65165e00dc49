"""Captioned images: records, readers, and Scenes, a generator of images with known truth."""
from capnb._lazy import lazy

lazy(__name__,
     records="Record CaptionDataset",
     coco="read_coco read_instances",
     folder="read_folder",
     load="load_data READERS",
     scenes="Scenes",
     scene_oracle="read_caption Reading",
     scene_facts="plant Planted Fact")
