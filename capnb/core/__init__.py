"""Foundations: errors for people, atomic files, progress, results, registries and the page kit."""
from capnb._lazy import lazy

lazy(__name__,
     errors="CapnbError DataError ConfigError DependencyError TrainingError MetricError require",
     files="atomic_write write_json read_json append_line read_lines sha256 cache_dir",
     progress="progress",
     registry="AREAS Registry",
     results="environment new_result save_result load_results Results",
     attribution="Attribution check_attribution",
     markup="esc table image_uri",
     figures="figure_svg plotting",
     page="Page",
     doctor="doctor format_doctor")
