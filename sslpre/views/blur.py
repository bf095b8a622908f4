"""Gaussian blur, with a width of its own for each image: torchvision's `gaussian_blur`, edges reflected."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU so many pixels at a time, as in colour.
_PIXELS_AT_ONCE = 2**15
# Bytes that may lie between images and blurred images on a GPU, as in a crop.
_ROOM = 2**28
# Taps further from the middle than so many widths are left out of a large image: together they weigh less than 1e-6.
_REACH = 5.0
_TOGETHER = 16  # columns that go through one convolution


def kernel_side(side: int, fraction: float) -> int:
    """Side of the kernel in pixels: odd, about `fraction` of the view's side, 1 where that leaves nothing to blur.

    SimCLR (Chen et al. 2020, appendix A) takes 10 %; this is how its code makes that odd: 23 at 224 px, 3 at 32 px.
    """
    # the small term keeps 0.29 × 100 = 28.999… at 29
    return int(side * fraction + 1e-6) // 2 * 2 + 1


def taps(sigma: Tensor, kernel: int) -> Tensor:
    """The kernel from its middle outwards, float32 [B, kernel // 2 + 1]; the whole of it sums to 1."""
    distance = torch.arange(kernel // 2 + 1, device=sigma.device, dtype=torch.float32)
    weight = (-0.5 * (distance / sigma.unsqueeze(1)).square()).exp()
    return weight / (2 * weight.sum(1, keepdim=True) - 1)  # the middle weighs 1 and is there once


def blur(images: Tensor, rows: Tensor, sigma: Tensor, kernel: int) -> None:
    """Blur images `rows` (int64) of float [B, 3, H, H] in place; `sigma` is float32 [len(rows)], in pixels, above 0.

    All on one device. A kernel of one pixel changes nothing.
    """
    if kernel < 3 or not len(rows):
        return
    if images.device.type != "cpu":
        blur_by_products(images, rows, sigma, kernel)
        return
    most = max(1, _PIXELS_AT_ONCE // (images.shape[-1] * images.shape[-2]))
    for part, weights in zip(rows.split(most), taps(sigma, kernel).split(most), strict=True):
        images.index_copy_(0, part, by_taps(images.index_select(0, part), weights))


def blur_by_products(images: Tensor, rows: Tensor, sigma: Tensor, kernel: int) -> None:
    """As `blur`, in a few launches, which is what counts on a GPU; some images at a time."""
    _, channels, side, _ = images.shape
    # of one image: itself, between both products and after; about six matrices while its own is made
    most = max(1, _ROOM // (4 * side * side * (3 * channels + 6)))
    for part, widths in zip(rows.split(most), sigma.split(most), strict=True):
        images.index_copy_(0, part, by_products(images.index_select(0, part), widths, kernel))


def by_products(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur is linear and separable, M · image · Mᵀ: two batched products with banded matrices. Not in place."""
    count, channels, side, _ = images.shape
    matrix = _banded(sigma, kernel, side)
    across = torch.bmm(images.reshape(count, channels * side, side), matrix.transpose(1, 2))
    return torch.matmul(matrix.unsqueeze(1), across.view_as(images))


def _banded(sigma: Tensor, kernel: int, side: int) -> Tensor:
    """The matrices of blurs along one axis, float32 [B, side, side], the reflection at both ends included."""
    place = torch.arange(side, device=sigma.device)
    source, target = place, place.unsqueeze(1)
    weights = F.pad(taps(sigma, kernel), (0, 1))  # the last is the weight of all that is further away
    far = kernel // 2 + 1
    matrix = weights[:, (source - target).abs().clamp(max=far)]
    # a pixel is also seen in the mirrors, which stand on the first and the last one
    matrix = matrix + weights[:, torch.where(source > 0, (source + target).clamp(max=far), far)]
    opposite = (2 * (side - 1) - source - target).clamp(max=far)
    return matrix + weights[:, torch.where(source < side - 1, opposite, far)]


def by_taps(images: Tensor, weights: Tensor) -> Tensor:
    """Shifted copies, weighed and summed, along both axes; `weights` as `taps` gives them. Not in place."""
    reach, side = weights.shape[1] - 1, images.shape[-1]
    columns = weights.t().view(reach + 1, -1, 1, 1, 1)
    for axis, pad in ((-2, (0, 0, reach, reach)), (-1, (reach, reach, 0, 0))):
        padded = F.pad(images, pad, mode="reflect")
        images = padded.narrow(axis, reach, side) * columns[0]
        for step in range(1, reach + 1):
            both = padded.narrow(axis, reach - step, side) + padded.narrow(axis, reach + step, side)
            images.add_(both.mul_(columns[step]))
    return images


def kernels(sigma: Tensor, kernel: int) -> list[Tensor]:
    """The kernel of each of `sigma` for `blur_one`, float32 [odd], without the taps that weigh nothing."""
    half, middle = taps(sigma, kernel), kernel // 2
    whole = torch.cat([half.flip(1), half[:, 1:]], 1)
    reach = [min(middle, math.ceil(width * _REACH)) for width in sigma.tolist()]
    return [row[middle - far : middle + far + 1] for row, far in zip(whole, reach, strict=True)]


def blur_one(image: Tensor, weights: Tensor) -> None:
    """Blur one image, float [3, H, H] on the CPU, in place; `weights` is one of `kernels`."""
    if len(weights) > 1:
        upright = _along_columns(image, weights).transpose(-1, -2)
        image.copy_(_along_columns(upright, weights).transpose(-1, -2))


def _along_columns(image: Tensor, weights: Tensor) -> Tensor:
    """Blur [3, H, W] along its columns.

    The columns go as channels of a depthwise convolution, several at once, which is the layout that oneDNN's kernels
    are for: at 224 px with 23 taps 0.10 ms, against 0.38 ms with the three colours as channels (one core, Zen 5).
    """
    reach, (colours, height, width) = len(weights) // 2, image.shape
    padded = F.pad(image, (0, 0, reach, reach), mode="reflect")
    padded = F.pad(padded, (0, -width % _TOGETHER)).contiguous()
    columns = padded.view(colours, height + 2 * reach, -1, _TOGETHER).permute(0, 3, 1, 2)
    blurred = F.conv2d(columns, weights.view(1, 1, -1, 1).expand(_TOGETHER, -1, -1, -1), groups=_TOGETHER)
    return blurred.permute(0, 2, 3, 1).reshape(colours, height, -1)[:, :, :width]
