"""kernels.c as a shared library: compiled once, kept where nobody else can write, checked before it is loaded."""
import contextlib, ctypes, hashlib, os, stat, subprocess, sys, tempfile
from pathlib import Path

from data.files import sync


def built_library(directory, key):
    """The library that build_library left in a directory, or None.

    Its name holds a hash of its bytes: a file that a full disk or a power cut shortened is never loaded (that would
    end the process). Nor is a file that another user owns or can write.
    """
    for file in directory.glob(f"kernels-{key}-*.so"):
        with contextlib.suppress(OSError, AttributeError):
            about = file.lstat()
            if about.st_uid != os.getuid() or about.st_mode & 0o022 or not stat.S_ISREG(about.st_mode):
                continue
            if hashlib.sha256(file.read_bytes()).hexdigest()[:16] == file.stem.rpartition("-")[2]:
                return declare(ctypes.CDLL(str(file)))
    return None


def build_library(directory, key, source, compilers):
    """`source` compiled by the first of `compilers` that can, left in a directory for the next time; None: none can."""
    print("compiling a few kernels for this CPU, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=directory) as build:
        file, built = Path(build) / "kernels.c", Path(build) / "kernels.so"
        file.write_text(source, encoding="utf-8")
        for compiler in compilers:
            for flags in (["-march=native", "-fopenmp"], ["-march=native"], []):                # not all have all
                with contextlib.suppress(OSError, AttributeError, subprocess.CalledProcessError):
                    subprocess.run([compiler, "-O3", "-fPIC", "-shared", *flags, file, "-o", built, "-lm"],
                                   check=True, capture_output=True)
                    compiled = declare(ctypes.CDLL(str(built)))
                    sync(built)
                    built.chmod(0o755)                # whatever the umask: see built_library
                    digest = hashlib.sha256(built.read_bytes()).hexdigest()[:16]
                    os.replace(built, directory / f"kernels-{key}-{digest}.so")
                    return compiled
    return None


def declare(built):
    """Tells ctypes the types of the arguments of each function in kernels.c."""
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, types in dict(
            linear=[pointer, pointer, integer, pointer], decode=[pointer, real, real, pointer, pointer],
            rms_norm=[pointer, pointer, real, integer, integer, pointer],
            rms_norm_backward=[pointer, pointer, real, integer, integer, *[pointer] * 3],
            to_heads=[pointer, pointer, real, *[pointer] * 4],
            to_heads_backward=[pointer, pointer, real, *[pointer] * 6],
            swiglu=[pointer, pointer, integer, pointer], swiglu_backward=[pointer, pointer, integer, *[pointer] * 3],
            cross_entropy=[pointer, pointer, integer, integer, pointer]).items():
        getattr(built, name).argtypes = types
    return built
