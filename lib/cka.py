"""Centred kernel alignment (CKA) between layers, estimated without bias from minibatches.

Linear CKA compares the Gram matrices of two layers over the same images. Grams are reduced inside
the hook, so a layer costs n x n numbers however wide it is. The estimator is that of Nguyen et al.
(2021): the unbiased HSIC of Song et al. (2012), summed over minibatches, divided once at the end.
"""

import warnings

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lib.intervals import jackknife
from lib.measure import Measurement, home_of_float64

ESTIMATORS = ("unbiased", "biased")
COLUMNS = {True: 2**13, False: 2**20}  # of activations taken at a time, on a CPU and on a GPU
SHARED = 0.9  # where the mean over the images has more of the energy, it is taken out beforehand
SMALLEST_BATCH = 4  # the unbiased HSIC divides by n (n - 3)


def cka(x, y, estimator: str = "unbiased") -> float:
    """CKA of two sets of activations of the same n images.

    Of arrays or tensors (n, ...); everything after the first axis is flattened. It is 1 for layers
    that are identical up to rotation, isotropic scaling and translation; about 0 for independent
    ones, and then possibly below 0: nothing is clamped. NaN if a layer does not vary over the
    images. The "biased" estimator is the HSIC printed in the paper; it tends to 1 as layers get
    wider than n.
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if len(x) != len(y):
        raise ValueError(f"CKA compares the same images in both; got {len(x)} and {len(y)}")
    _check(estimator)
    if len(x) < SMALLEST_BATCH:
        why = f"a minibatch of {len(x)} images is too small for the unbiased HSIC"
        raise ValueError(f"{why}, which needs 4 or more")
    gram_x, gram_y = centred_gram(x, estimator), centred_gram(y, estimator)
    return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))


def centred_gram(x: Tensor, estimator: str = "unbiased") -> Tensor:
    """Centred Gram matrix (n, n) in float64 of activations (n, ...).

    Inner products of two such matrices are HSIC up to a factor that depends on n alone:
    n (n - 3) for the unbiased estimator, (n - 1)^2 for the biased one. A layer that does not vary
    over the images gives zeros.
    """
    x = x.flatten(1) if x.dim() > 1 else x[:, None]
    x = x if x.is_floating_point() else x.double()
    n, precision = len(x), torch.promote_types(x.dtype, torch.float32)
    gram = torch.zeros(n, n, dtype=torch.float64, device=home_of_float64(x.device))
    # Piece by piece everything stays in the processor's cache, and rounding errors cannot add up:
    # a piece is summed in the layer's precision, the pieces in float64.
    shared = False
    for piece in x.split(COLUMNS[x.device.type == "cpu"], dim=1):
        piece = piece.to(precision)
        if not shared:
            part = piece @ piece.T
            shared = bool(part.sum() > SHARED * n * part.trace())
        if shared:
            # HSIC ignores what all images share, but large it would drown their differences in
            # rounding errors. Subtracting one image is exact: a constant layer becomes zero.
            piece = piece - piece[:1]
            part = piece @ piece.T
        gram += part.to(gram.device)
    first = x[0].to(precision)
    if gram.diagonal().sum() <= torch.finfo(x.dtype).eps ** 2 * n * (first @ first):
        gram.zero_()
    return centre(gram, estimator)


def centre(gram: Tensor, estimator: str = "unbiased") -> Tensor:
    """Centre a Gram matrix (n, n), in float64.

    For the biased estimator rows and columns get mean zero; for the unbiased one the diagonal is
    left out of everything (U-centring).
    """
    n = len(gram)
    gram = gram.to(home_of_float64(gram.device), torch.float64, copy=True)
    if estimator == "biased":
        return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    gram.fill_diagonal_(0)
    rows = gram.sum(1)
    gram -= (rows[:, None] + rows[None]) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


class MinibatchCKA(Measurement):
    """CKA between all taps of all networks, from minibatches of the same images.

    The biased estimator is here to show what it does. Minibatches are weighed by their images. The
    published rule sums them plainly; of unequal ones the weighted sum is the better estimator (root
    mean square error .016 against .024 for eight of 64 images and one of 8). Smaller than 4, they
    cannot be used.
    """

    smallest = SMALLEST_BATCH

    def __init__(self, taps="all", estimator: str = "unbiased"):
        super().__init__(taps)
        _check(estimator)
        self.estimator = estimator

    def reduce(self, value: Tensor) -> Tensor:
        return centred_gram(value, self.estimator)

    def make_room(self, reduced, images) -> None:
        self.room(reduced, hsic=(self.groups, len(reduced), len(reduced)))

    def add(self, group: int, reduced, images) -> None:
        n = len(reduced[self.names[0]])
        flat = torch.stack([reduced[name].flatten() for name in self.names])
        hsic = flat @ flat.T / (n * (n - 3) if self.estimator == "unbiased" else (n - 1) ** 2)
        self.hsic[group] += n * hsic

    def results(self) -> xr.Dataset:
        """The estimate and what its interval is made of.

        ``cka``, ``low``, ``high`` (tap, other): estimate and 95 % interval (jackknife over groups
        of minibatches); ``hsic`` (group, tap, other): the groups' summed HSICs.
        """
        hsic = self.hsic.cpu().numpy()
        found = jackknife(hsic, alignment)
        if undefined := np.array(self.names)[np.isnan(np.diag(found.value))].tolist():
            why = "constant over the images, or too few images to tell it from constant"
            if np.isnan(hsic).any():
                why = "numbers that are not finite, from the network's weights or its input"
            warnings.warn(f"CKA is undefined for {', '.join(undefined)}: {why}", stacklevel=2)
        square = ("tap", "other")
        ends = {"cka": found.value, "low": found.low, "high": found.high}
        variables = {name: (square, values) for name, values in ends.items()}
        variables["hsic"] = (("group", *square), hsic)
        return xr.Dataset(variables, {"tap": self.names, "other": self.names})


def alignment(hsic: np.ndarray) -> np.ndarray:
    """CKA from HSICs (..., taps, taps); NaN where a layer's HSIC with itself is not positive."""
    own = np.diagonal(hsic, axis1=-2, axis2=-1)
    own = np.sqrt(np.where(own > 0, own, np.nan))
    return hsic / (own[..., :, None] * own[..., None, :])


def _check(estimator):
    if estimator not in ESTIMATORS:
        raise ValueError(f"there is no estimator {estimator!r}; use one of {', '.join(ESTIMATORS)}")
