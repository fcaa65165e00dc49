"""Tuning methods: zero-shot, prompt tuning, LoRA, full."""
from capnb._lazy import lazy

lazy(__name__,
     methods="METHODS attach Tuned",
     adapters="load_adapter")
