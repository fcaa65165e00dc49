"""Personalize (arXiv 2412.03665): what every way to adapt a captioner gains, and what it forgets."""
from capnb._lazy import lazy

lazy(__name__,
     protocol="KNOWN UNKNOWN LR_TRIALS SGD ADAMW",
     probes="make_probes answer_probes probes_from_instances",
     retention="Retention kept kept_interval",
     grid="Bench Setting Task run_grid run_full scenes_task style_task",
     compare="read_grid condense_grid comparison_table",
     exchange="read_method_comparison to_method_comparison write_method_comparison",
     pareto="pareto pareto_page",
     contrastive="contrastive_caption",
     verify="Verifier DualScore",
     raters="caption_rating_page rating_results",
     wordings="under_wordings",
     real_cost="expected_memory expected_seconds",
     real_size="evaluate_sets measure_methods")
