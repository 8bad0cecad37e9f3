"""Builds the kernel repos beside this file into `<repo>/build/<variant>/`, as `kernels` wants it.

    python kernel_hub/build.py [--variant universal|cpu|cuda] [--force] [--sanitize | --emulate]
                               [--output DIR] [--jobs N] [REPO ...]

Needs no nix: g++ (or what CXX names) and, for its headers, an installed torch >= 2.11; Python's own
headers are not needed. One build serves every later torch and every Python: only torch's stable ABI
is used. The universal variant needs neither, the CUDA variant, which is built only if it is named,
nvcc (see nvcc.py) beside them. A build whose sources have not changed is kept. The exit status is 0
if everything asked for is built, 2 if there is no compiler.
"""

import argparse
import fcntl
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvcc as cuda_compiler
from variant import BY_DEFAULT, KINDS, LINK_FLAGS, BuildError, Variant, check_files, write_files

HERE = Path(__file__).resolve().parent
# -O1: the kernels count on inlining; without it every vector goes through memory.
SANITIZE_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# kernel-builder generates a header of this name too; there it also makes a Python extension module.
REGISTRATION_H = """#pragma once
#define STABLE_TORCH_LIBRARY_EXPAND(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(ns, k, m) STABLE_TORCH_LIBRARY_IMPL(ns, k, m)
#define REGISTER_EXTENSION(ns)
"""


def find_compiler() -> str:
    """The C++ compiler to use."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise BuildError(
            f"no C++ compiler: {name!r} was not found. Install g++ 11 or newer (Debian, Ubuntu: "
            "apt-get install g++) or set CXX.",
            status=2,
        )
    return found


def torch_folder() -> Path:
    """Where torch lies, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"torch is not installed for {sys.executable}")
    return Path(spec.submodule_search_locations[0])


def run(command: list[str]) -> None:
    """Runs `command`; its output is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compile_library(variant: Variant, work: Path, target: Path, jobs: int) -> None:
    """Compiles the units of `variant` side by side and links them into `target`."""
    compiler, torch = find_compiler(), torch_folder()
    nvcc = cuda_compiler.find() if variant.cuda_flags else None
    (work / "registration.h").write_text(REGISTRATION_H)
    for_torch = [
        f"-DTORCH_EXTENSION_NAME={variant.id}",
        f"-I{work}",
        *(f"-I{folder}" for folder in variant.includes),
        "-isystem",
        str(torch / "include"),
    ]

    def compile_unit(unit: str) -> str:
        source, output = str(variant.folder / unit), str(work / (Path(unit).stem + ".o"))
        if unit in variant.cuda_flags:
            includes = [f"-I{folder}" for folder in variant.includes]
            run([str(nvcc), *variant.cuda_flags[unit], *includes, "-c", source, "-o", output])
        else:
            language = ["-x", "c++"] if unit.endswith(".cu") else []
            run([compiler, *variant.flags, *for_torch, *language, "-c", source, "-o", output])
        return output

    # The levels and CUDA's kernels take longest: started first, the jobs end together.
    with ThreadPoolExecutor(jobs) as pool:
        is_quick = [(not ("level" in unit or unit.endswith(".cu")), unit) for unit in variant.units]
        objects = list(pool.map(compile_unit, [unit for _, unit in sorted(is_quick)]))
    sanitizers = [flag for flag in variant.flags if flag.startswith("-fsanitize")]
    flags = [*LINK_FLAGS, *(sanitizers or ["-Wl,--strip-all"])]
    if nvcc:
        compiler = nvcc
        flags = [f"-Xcompiler={x}" if x.startswith(("-W", "-p")) else x for x in flags]
        flags = [x.replace(",", "\\,") for x in flags] + cuda_compiler.link_flags(nvcc)
    run([compiler, *objects, f"-L{torch / 'lib'}", *flags, "-o", str(target)])


def is_current(variant: Variant, target: Path) -> bool:
    """Whether `target` holds a build of just these sources."""
    try:
        built = json.loads((target / "metadata.json").read_text())["id"]
    except (OSError, ValueError, KeyError):
        return False
    return built == variant.id and (target / (variant.library or "_ops.py")).is_file()


def build(variant: Variant, output: Path, *, force: bool, jobs: int) -> Path:
    """Builds `variant` into `output` unless that is current; returns its folder."""
    target = output / variant.folder_name
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builder at a time; the others then find it done
        if is_current(variant, target) and not force:
            print(f"{variant.name}: {target.name} is current ({variant.id})")
            return target
        with tempfile.TemporaryDirectory(dir=output, prefix=".tmp-") as work:
            fresh = Path(work) / "variant"
            fresh.mkdir()
            if variant.library:
                compile_library(variant, Path(work), fresh / variant.library, jobs)
            write_files(variant, fresh)
            sanitized = any("sanitize" in flag for flag in variant.flags)
            missing = [] if sanitized else check_files(variant, fresh)
            # A rename replaces the build at once: no one ever sees half of it.
            if target.exists():
                target.rename(Path(work) / "old")
            fresh.rename(target)
    print(f"{variant.name}: built {target.name} ({variant.id})")
    for check in missing:
        print(f"note: not checked: {check}")
    return target


def main() -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repos", nargs="*", help="names of repos (default: all)")
    parser.add_argument("--variant", choices=KINDS, help="only this one (default: all but cuda)")
    parser.add_argument("--force", action="store_true", help="build even if nothing changed")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument("--emulate", action="store_true", help="CUDA's kernels on a CPU: tests")
    parser.add_argument("--output", type=Path, help="instead of <repo>/build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    repos = [HERE / name for name in args.repos] or [
        path.parent for path in sorted(HERE.glob("*/build.toml"))
    ]
    if not sys.platform.startswith("linux"):
        print(f"error: only Linux is supported, not {sys.platform}", file=sys.stderr)
        return 1
    try:
        kinds = ["emulated"] if args.emulate else [args.variant] if args.variant else BY_DEFAULT
        flags = SANITIZE_FLAGS if args.sanitize else []
        for repo, kind in itertools.product(repos, kinds):
            nvcc = cuda_compiler.find() if kind == "cuda" else None
            if kind == "cuda" and (reason := cuda_compiler.refusal(nvcc)):
                raise BuildError(reason, status=2)
            variant = Variant(repo, kind, flags, nvcc)
            output = args.output or repo / (".build" if args.emulate else "build")
            build(variant, output, force=args.force, jobs=max(args.jobs, 1))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
