"""Foundations: errors for people, atomic files, progress, results, registries and the page kit."""
from capnb._lazy import lazy

lazy(__name__,
     errors="CapnbError DataError ConfigError DependencyError TrainingError MetricError require",
     files="atomic_write plain write_json read_json append_line read_lines sha256 cache_dir",
     progress="progress",
     registry="AREAS Registry",
     results="environment new_result save_result load_results find_done result_row Results",
     attribution="Attribution check_attribution keep_top",
     markup="Html esc markup tag table marked figure image_uri",
     figures="plotting new_figure figure_svg",
     page="Page",
     doctor="doctor format_doctor",
     fetch="part_folder",
     claims="claim judge read_claims save_claims claims_table")
