"""Tuning methods: zero-shot, prompts, prefixes, adapters, LoRA and its kin, full; remedies against forgetting; the way back by alpha."""
from capnb._lazy import lazy

lazy(__name__,
     methods="METHODS attach Tuned",
     adapters="load_adapter",
     prompt_sweep="PROMPTS PromptSweep",
     remedies="REMEDIES apply_remedies split_method list_remedies",
     alpha="alpha_sweep AlphaCurve front hypervolume",
     kinds="RsLora Dora Ia3 Bias PromptTuning Qlora",
     prefix="Prefix",
     bottleneck="Bottleneck",
     battery="battery CASES method_matrix matrix_table",
     names="label")
