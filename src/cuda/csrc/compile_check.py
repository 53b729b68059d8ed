"""Compiles the kernels for several architectures, without a card, and prints what they use.

    python src/cuda/csrc/compile_check.py [8.0 8.6 ...]

Fails where a fast kernel spills registers, or one that searches stores more of them than it did.
Wants nvcc, and cuRAND's headers from the CUDA toolkit or from the PyPI package nvidia-curand.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ["8.0", "8.6", "9.0", "12.0"]
FAST = (
    "fused_kernel",
    "logits_kernel",
    "positions_kernel",
    "decide_kernel",
    "draw_kernel",
    "tile_stats_kernel",
    "block_kernel",
    "product_kernel",
    "attention_kernel",
    "embed_kernel",
    "advance_kernel",
)
# Launched from sm_90 on, where clusters are, or beside kernels in clusters.
IN_CLUSTERS = ("positions_kernel", "decide_kernel", "draw_kernel", "walk_kernel")
OTHERS = (
    "thread_per_row_kernel",
    "threshold_kernel",
    "clear_kernel",
    "finish_kernel",
    "floor_kernel",
)
# Bytes that those which search for what filters keep may store, around that search and outside of
# the loops over tiles: positions_kernel with filters, and once a position walk_kernel.
SEARCHING = {"positions_kernel": 98, "walk_kernel": 336}
KERNEL = re.compile(rf"\d({'|'.join((*FAST, *OTHERS, *SEARCHING))})[IE]")  # in a mangled name
STEPS = {"0": "in cluster", "1": "alone", "2": "sum", "3": "select"}
DTYPES = {"f": "float32", "8BFloat16": "bfloat16", "7Float16": "float16"}
# One entry function's report.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def include_folders(nvcc: str) -> list[Path]:
    """CUDA's headers, which nvcc itself finds wherever it is a script or a link to, and PyPI's."""
    source = Path(tempfile.gettempdir(), "empty.cu")
    source.touch()
    command = [nvcc, "--dryrun", "-c", str(source)]
    report = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.*)", report)
    folders = [*Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include")]
    return folders + ([Path(top[1].strip(), "include")] if top else [])


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: the CUDA kernels were not compiled")
        return 0
    includes = [f"-I{folder}" for folder in include_folders(nvcc)]
    if not binding_compiles(nvcc):
        return 1
    architectures = sys.argv[1:] or ARCHITECTURES
    spilled = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda name: compile_kernels(nvcc, includes, name), architectures)
        for architecture, result in zip(architectures, compiled, strict=True):
            log = result.stdout + result.stderr
            if result.returncode != 0:
                print(log)
                return result.returncode
            for kernel in REPORT.finditer(log):
                spills = int(kernel["stores"]) + int(kernel["loads"])
                print(
                    f"sm_{architecture.replace('.', ''):4} {describe(kernel['name']):40}"
                    f" {kernel['registers']:>4} registers {kernel['stack']:>5} B stack"
                    f" {spills:>5} B spilled",
                    flush=True,
                )
                name = KERNEL.search(kernel["name"])[1]
                runs = float(architecture) >= 9 or name not in IN_CLUSTERS
                spilled |= runs and spills > 0 and int(kernel["stores"]) >= least_refused(kernel)
    if spilled:
        print(f"one of {', '.join(FAST)} spills registers where it runs", file=sys.stderr)
    return int(spilled)


def least_refused(kernel: re.Match) -> float:
    """Bytes stored by a kernel that spills, from which on it is refused."""
    name = KERNEL.search(kernel["name"])[1]
    filtered = name != "positions_kernel" or "Lb1E" in kernel["name"]
    if name in SEARCHING and filtered:
        return SEARCHING[name] + 1
    return 0 if name in FAST else float("inf")


def compile_kernels(
    nvcc: str, includes: list[str], architecture: str
) -> subprocess.CompletedProcess:
    """With ptxas's report."""
    example = HERE.parent.parent.parent / "examples" / "cpp" / "verify.cu"
    kernels = [*sorted(HERE.glob("*_kernel.cu")), example]
    number = architecture.replace(".", "")
    command = [nvcc, "-c", "-O3", "-std=c++20", "--fmad=false", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}", f"-I{HERE}", *includes]
    with tempfile.TemporaryDirectory() as folder:
        command += [*map(str, kernels), "-odir", folder]
        return subprocess.run(command, capture_output=True, text=True)


def describe(mangled: str) -> str:
    kernel = KERNEL.search(mangled)[1]
    dtype = re.search(kernel + r"I(?:NS0_)?(8BFloat16|7Float16|f)", mangled)
    step = re.search(r"StepE(\d)", mangled)
    flag = {"logits_kernel": "block", "positions_kernel": "filters"}.get(kernel)
    parts = [kernel, dtype and DTYPES[dtype[1]], step and STEPS[step[1]]]
    parts.append(flag if "Lb1E" in mangled else None)
    return ", ".join(part for part in parts if part)


def binding_compiles(nvcc: str) -> bool:
    """The binding's CUDA half against torch's headers, which a CPU build of torch has as well, but
    for one file that CMake writes."""
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return True
    folders = [*include_paths(), *include_folders(nvcc)]
    with tempfile.TemporaryDirectory() as stub:
        macros = Path(stub, "c10", "cuda", "impl", "cuda_cmake_macros.h")
        macros.parent.mkdir(parents=True)
        macros.write_text("#pragma once\n")
        includes = ["-isystem" + str(folder) for folder in [*folders, stub]]
        includes.append("-I" + sysconfig.get_path("include"))
        command = [compiler, "-fsyntax-only", "-std=c++20", "-Wall", "-DWITH_CUDA", *includes]
        sources = [str(path) for path in sorted(HERE.glob("*.cpp"))]
        return all(subprocess.run([*command, path]).returncode == 0 for path in sources)


if __name__ == "__main__":
    sys.exit(main())
