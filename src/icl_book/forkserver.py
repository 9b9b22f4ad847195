"""Kernels forked from a process that has imported what a notebook imports, and holds
its model; a worker of a sweep keeps one. What a run changes, no other run sees.

Linux alone; elsewhere every kernel starts from nothing. ``python -m
icl_book.forkserver`` is that process. It starts no thread, so that a fork is whole.
"""

import ast
import ctypes
import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress

import nbformat
import psutil

from icl_book.execute import Provisioner, kernel_env
from icl_book.store import ROOT


def modules_of(notebook) -> list[str]:
    """What the code cells of a notebook import, in order."""
    found = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        with suppress(SyntaxError):  # a magic; its cell imports for itself
            code = cell.source if cell.cell_type == "code" else ""
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Import):
                    found |= dict.fromkeys(name.name for name in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found[node.module] = None
    return list(found)


class ForkServer:
    """The process, for a list of modules, a model (``[name, dtype]`` or ``None``) and a
    number of threads. It ends with the one that started it, and its kernels with it.

    Raises:
        RuntimeError: it has not begun.
    """

    def __init__(self, modules, model, threads):
        self.needs = [modules, model, threads]
        # a module beside the notebook must not stand before the package's: -P
        command = [sys.executable, "-P", "-m", "icl_book.forkserver"]
        self.process = subprocess.Popen(
            [*command, json.dumps(self.needs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kernel_env(threads) | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            cwd=ROOT,
            start_new_session=True,
        )
        if not self.process.stdout.readline():
            raise RuntimeError("the process that kernels are forked from did not begin")

    def fork(self, file) -> int:
        """The number of a new kernel with a connection file."""
        print(file, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def provisioner(self):
        """A class that :func:`icl_book.execute.run_once` takes."""
        server = self

        class Forked(Provisioner):
            async def launch_kernel(self, cmd, **options):
                try:
                    self.process = Child(server.fork(self.parent.connection_file))
                except (OSError, ValueError, psutil.NoSuchProcess):
                    raise RuntimeError("no kernel could be forked") from None
                self.pid = self.pgid = self.process.pid
                return self.connection_info

        return Forked

    def close(self):
        """End it, and every kernel that it has forked."""
        self.process.kill()
        self.process.communicate()  # closes its pipes, and waits


_server = None  # of this worker


def provisioner(run):
    """What starts the kernel of a run: this worker's server where there can be one."""
    global _server
    if sys.platform != "linux":
        return Provisioner
    model, dtype = map(run.parameters.get, ("model", "dtype"))
    model = [model, dtype or "auto"] if model else None
    needs = [modules_of(run.notebook), model, run.threads]
    if _server is None or _server.needs != needs or _server.process.poll() is not None:
        if _server is not None:
            _server.close()
        _server = ForkServer(*needs)
    return _server.provisioner()


class Child(psutil.Process):
    """A kernel, with what jupyter_client asks of a child that it has started."""

    stdin = stdout = stderr = None

    def poll(self):
        with suppress(psutil.NoSuchProcess):
            if self.is_running() and self.status() != psutil.STATUS_ZOMBIE:
                return None
        return 0


def main(modules, model, threads):
    """Fork a kernel for each line of input, a connection file; answer its number."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in ["ipykernel.kernelapp", *modules]:
        with suppress(Exception):  # the notebook's own import will say
            importlib.import_module(name)
    torch = sys.modules.get("torch")
    if torch:
        torch.set_num_threads(1)
    if model is not None:
        with suppress(Exception):  # likewise
            from icl.models import preload_model

            preload_model(model[0], getattr(torch, model[1], None))
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", file=answers, flush=True)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            answers.close()
            return _kernel(line.strip(), torch, threads)
        print(pid, file=answers, flush=True)


def _kernel(file, torch, threads):
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if torch:
        torch.set_num_threads(threads)
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(["-f", file, f"--IPKernelApp.parent_handle={parent}"])


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
