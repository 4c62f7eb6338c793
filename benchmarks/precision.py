"""What lower precision would change in CKA between all layers: why networks run in float32.

The lab's four networks, trained, over test scenes. bfloat16 is that of autocast. A CPU has no TF32,
so the factors of every matrix product and convolution are rounded to its 10 bits, which is what a
GPU does with them before it multiplies. Either the networks alone work so, or CKA's tables of
likenesses as well, as they would if nobody took care::

    python -m benchmarks.precision --out book/results/cost-precision.json
"""

import contextlib

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import shared
from benchmarks.book import ROLES, Drawn, no_cache
from lib.cka import MinibatchCKA
from lib.measure import measure
from lib.taps import unfused_attention

EXACT = 1e-3  # what is asked of CKA
WHAT = "ViT, mean-pooled ViT, ResNet and Mixer of the lab, CKA of all pairs of taps"
aten = torch.ops.aten
# The arguments of a product that are multiplied; others are added.
FACTORS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}


def main():
    parser = shared.options(__doc__, batch=64, repeats=1)
    parser.add_argument("--images", type=int, default=1024, help="(default: 1024)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = Drawn(options.images)
    exact = cka(study, options.batch)
    rows = []
    for name, lower in (("bfloat16", bfloat16), ("TF32", TF32)):
        for alone in (True, False):
            difference = np.abs(cka(study, options.batch, lower, alone) - exact)
            rows.append(
                {
                    "name": name,
                    "where": "networks" if alone else "networks and likenesses",
                    "largest": float(f"{np.nanmax(difference):.2g}"),
                    "median": float(f"{np.nanmedian(difference):.2g}"),
                    "off_percent": round(100 * float((difference > EXACT).mean()), 2),
                }
            )
            print(rows[-1], flush=True)
    shared.result(WHAT, options, rows, images=options.images, exact=EXACT)


def cka(study, batch, lower=contextlib.nullcontext, networks_alone=True) -> np.ndarray:
    """CKA of all pairs of taps with the forward passes in lower precision."""
    measurement = MinibatchCKA()
    if networks_alone:
        reduce = measurement.reduce

        def in_full(value):
            with torch.autocast("cpu", enabled=False), TF32.paused():
                return reduce(value)

        measurement.reduce = in_full
    with no_cache(), contextlib.ExitStack() as stack:
        for role in ROLES:  # the fused kernel's products could not be rounded
            stack.enter_context(unfused_attention(study.model(role)))
        stack.enter_context(lower())
        return measure(study, ROLES, [measurement], len(study.drawn), batch)["cka"].values


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


class TF32(TorchDispatchMode):
    """Factors of products as a GPU's TF32 units see them: of 23 bits, 10 are kept."""

    on = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = FACTORS.get(function, ()) if TF32.on else ()
        args = [rounded(a) if place in factors else a for place, a in enumerate(args)]
        return function(*args, **(kwargs or {}))

    @classmethod
    @contextlib.contextmanager
    def paused(cls):
        cls.on = False
        try:
            yield
        finally:
            cls.on = True


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float32 values to the nearest ones that TF32 has; others as they are."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    even = (bits >> 13) & 1
    return ((bits + 0xFFF + even) & ~0x1FFF).view(torch.float32)


if __name__ == "__main__":
    main()
