"""Gaussian blur, with a width of its own for each image."""

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor


def kernel_side(side: int, fraction: float) -> int:
    """Side of the kernel in pixels: odd, about `fraction` of the view's side, 1 where that leaves nothing to blur.

    SimCLR (Chen et al. 2020, appendix A) takes 10 %; this is how its code makes that odd: 23 at 224 px, 3 at 32 px.
    """
    # the small term keeps 0.29 × 100 = 28.999… at 29
    return int(side * fraction + 1e-6) // 2 * 2 + 1


def blur(images: Tensor, rows: Tensor, sigma: Tensor, kernel: int) -> None:
    """Blur images `rows` (int64) of float [B, 3, H, W] in place: torchvision's `gaussian_blur`, edges reflected.

    `sigma` is float32 [len(rows)], in pixels, above 0, on the CPU: kornia checks its sign, which on a device would
    wait. A kernel of one pixel changes nothing.
    """
    if kernel < 3 or not len(rows):
        return
    most = len(rows)
    if images.device.type == "cpu":
        most = max(1, 2**18 // (images.shape[-1] * images.shape[-2]))  # keeps the padded copies in the cache
    for part, width in zip(rows.split(most), sigma.split(most), strict=True):
        blurred = gaussian_blur2d(images.index_select(0, part), (kernel, kernel), torch.stack([width, width], 1))
        images.index_copy_(0, part, blurred)
