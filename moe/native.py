"""The C functions of ``native.c``: compiled once per machine with the compiler that it has, or absent.

PyTorch's own CPU kernels serve large tensors well; at the size of a small trial its tanh-GELU, its attention with
dropout and its dropout take most of a step. Products stay PyTorch's. Without a C compiler, or with JOULEMOE_NATIVE=0,
`library` is None and PyTorch's operators run instead; results agree to float32 rounding, random dropout masks differ.

The shared object lies in $XDG_CACHE_HOME/joulemoe (~/.cache/joulemoe), named after source, compiler and CPU, because
it is compiled for this very CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_TIMEOUT_S = 60


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _openmp() -> Path | None:
    """The OpenMP runtime that PyTorch itself loaded: a second one would bring a second pool of threads."""
    site = Path(torch.__file__).parent
    found = [*site.glob("lib/libgomp*.so*"), *site.parent.glob("torch.libs/libgomp*.so*")]
    return found[0] if found else None


def _cpu() -> str:
    """What the compiler's ``native`` depends on: a home folder may be shared between unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


def _folder() -> Path:
    """A cache folder of this user, or a fresh private one where the home is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "joulemoe"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="joulemoe-"))


def _build(compiler: str, openmp: Path | None, target: Path) -> None:
    """Compile and link into ``target``, which appears whole or not at all.

    Raises:
        OSError, subprocess.SubprocessError: the compiler cannot.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made, linked = Path(scratch) / "native.o", Path(scratch) / "native.so"
        threads = "-fopenmp" if openmp else "-fopenmp-simd"
        link = [str(openmp)] if openmp else []
        commands = (
            [compiler, *_FLAGS, threads, "-c", str(SOURCE), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(linked), *link, "-lm"],
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
        os.replace(linked, target)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None without a compiler, after a failed build, and with JOULEMOE_NATIVE=0."""
    compiler = _compiler()
    if os.environ.get("JOULEMOE_NATIVE") == "0" or compiler is None:
        return None
    for openmp in dict.fromkeys((_openmp(), None)):
        try:
            parts = (SOURCE.read_text(), compiler, *_FLAGS, str(openmp), torch.__version__, _cpu())
            key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
            target = _folder() / f"native-{key}.so"
            if not target.exists():
                _build(compiler, openmp, target)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def serves(*tensors: Tensor) -> bool:
    """Whether the C functions can take these tensors: float32 on a CPU, in eager mode without autocast."""
    if torch.compiler.is_compiling() or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    return library() is not None and not torch.is_autocast_enabled("cpu")


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else None if value is None else ctypes.c_int64(value)


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Pass tensors by address, numbers as int64 or float."""
    getattr(library(), name)(*map(_argument, arguments))


def _threads() -> int:
    return torch.get_num_threads()


def gelu(pre_RW: Tensor, bias_W: Tensor, hidden_RW: Tensor) -> None:
    """hidden = gelu(pre + bias), the tanh form; ``pre`` becomes its slope there. Rows may be strided, columns not."""
    rows, width = pre_RW.shape
    _call("gelu_forward", pre_RW, bias_W, hidden_RW, rows, width, pre_RW.stride(0), hidden_RW.stride(0), _threads())


def scale_by_slope(gradient_RW: Tensor, slope_RW: Tensor, column_sum_W: Tensor) -> None:
    """gradient *= slope in place; ``column_sum`` becomes its sum over rows."""
    rows, width = gradient_RW.shape
    strides = gradient_RW.stride(0), slope_RW.stride(0)
    _call("scale_by_slope", gradient_RW, slope_RW, column_sum_W, rows, width, *strides)


def sort_rows(slot_R: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Positions of the rows sorted by slot (stable, negative ones last), and the number of rows of each expert."""
    slot_R = slot_R.contiguous()
    order_R, count_N = torch.empty_like(slot_R), slot_R.new_empty(experts)
    _call("sort_rows", slot_R, slot_R.numel(), experts, order_R, count_N)
    return order_R, count_N


def combine(rows_RD: Tensor, order_R: Tensor, weight_R: Tensor | None, tokens: int, choices: int, live: int) -> Tensor:
    """Each token's weighted sum of its rows among the first ``live`` ones."""
    y_TD = rows_RD.new_empty(tokens, rows_RD.shape[1])
    _call("combine", rows_RD, order_R, weight_R, y_TD, live, tokens, choices, rows_RD.shape[1])
    return y_TD


def spread(
    dy_TD: Tensor, out_RD: Tensor, order_R: Tensor, weight_R: Tensor, choices: int, live: int
) -> tuple[Tensor, Tensor]:
    """The gradient of ``combine`` by rows [live, D] and by weights [R]."""
    dout_RD, dweight_R = dy_TD.new_empty(live, dy_TD.shape[1]), torch.zeros_like(weight_R)
    _call("spread", dy_TD, out_RD, order_R, weight_R, dout_RD, dweight_R, live, choices, dy_TD.shape[1])
    return dout_RD, dweight_R


def softmax_gradient(logits_TV: Tensor, label_T: Tensor, ignore: int) -> Tensor:
    """Cross-entropy of each row, nats, 0 where ignored; ``logits`` becomes softmax - one-hot."""
    loss_T = logits_TV.new_empty(logits_TV.shape[0])
    _call("softmax_gradient", logits_TV, label_T, loss_T, *logits_TV.shape, ignore, _threads())
    return loss_T


def draw_seed(p: float) -> int:
    """A seed from PyTorch's generator, so that `torch.manual_seed` governs dropout here too; 0 without dropout."""
    return int(torch.randint(2**62, ())) if p > 0 else 0


def attention_forward(qkv_BSC: Tensor, heads: int, scale: float, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """Causal attention of [B, S, 3·D], heads of width D / heads side by side: [B, S, D], and log-sum-exps [B, H, S]."""
    B, S, C = qkv_BSC.shape
    out_BSD, lse_BHS = qkv_BSC.new_empty(B, S, C // 3), qkv_BSC.new_empty(B, heads, S)
    _call("attention_forward", qkv_BSC, out_BSD, lse_BHS, B, S, heads, C // 3 // heads, scale, p, seed, _threads())
    return out_BSD, lse_BHS


def attention_backward(
    qkv_BSC: Tensor, out_BSD: Tensor, dout_BSD: Tensor, lse_BHS: Tensor, scale: float, p: float, seed: int
) -> Tensor:
    """The gradient by qkv."""
    (B, S, C), heads = qkv_BSC.shape, lse_BHS.shape[1]
    dqkv_BSC = torch.empty_like(qkv_BSC)
    shape = B, S, heads, C // 3 // heads
    _call("attention_backward", qkv_BSC, out_BSD, dout_BSD, lse_BHS, dqkv_BSC, *shape, scale, p, seed, _threads())
    return dqkv_BSC


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x with elements zeroed with probability p and the others scaled by 1 / (1 - p); one seed, one mask."""
    y = torch.empty_like(x)
    _call("dropout", x, y, x.numel() // max(x.shape[-1], 1), x.shape[-1], p, seed)
    return y
