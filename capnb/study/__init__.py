"""Studies: plan, run, report and command line."""
from capnb._lazy import lazy

lazy(__name__,
     plan="Plan",
     run="run_study",
     report="write_report")
