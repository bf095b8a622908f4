"""Random resized crop and flip: boxes as torchvision draws them, then crop, antialiased resize and flip in one go."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslpre.views import pool

ATTEMPTS = 10
NUMBERS = 2 * ATTEMPTS + 2  # uniform numbers that one box takes
# On a CPU the products win up to this many pixels of canvas side × output side, one image at a time above it. μs per
# view on one core (Zen 5), products : slices, canvas → view: 32→32 9 : 18, 48→32 15 : 18, 64→32 23 : 20, 48→48 28 : 22.
LARGEST_PRODUCT = 1600
# Bytes that may lie between pixels and views: little enough for a GPU to spare, or for a CPU's cache.
_ROOM = 2**28
_ROOM_ON_A_CPU = 2**23


def draw_boxes(numbers: Tensor, size: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Boxes as of torchvision's RandomResizedCrop: int64 [B, 4], top, left, height, width.

    The crop of Szegedy et al. 2015 ("Going deeper with convolutions"). `numbers` are uniform, [B, NUMBERS]; `size` is
    int64 [B, 2], height and width of each image; `scale` is the range of the area as a fraction of the image's,
    `ratio` that of width / height, log-uniform. Ten attempts; where none fits into the image, the largest central box
    whose aspect lies within `ratio`. At least one pixel high and wide.
    """
    numbers, height, width = numbers.double(), size[:, :1].double(), size[:, 1:].double()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS]).exp()
    # torch.round, like Python's round in torchvision, takes halves to even
    wide, tall = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first maximum, so the first attempt that fits
    found = fits.any(1, keepdim=True)
    central_tall, central_wide = _central(height, width, ratio)
    tall = torch.where(found, tall.gather(1, first), central_tall)
    wide = torch.where(found, wide.gather(1, first), central_wide)
    top = torch.where(found, (numbers[:, -2:-1] * (height - tall + 1)).floor(), ((height - tall) / 2).floor())
    left = torch.where(found, (numbers[:, -1:] * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
    return torch.cat([top, left, tall, wide], 1).long()


def _central(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Height and width of torchvision's fallback; the clamp is ours: a 1×1 image has no box of aspect 2."""
    aspect = width / height
    tall = torch.where(aspect < min(ratio), (width / min(ratio)).round(), height)
    wide = torch.where(aspect > max(ratio), (height * max(ratio)).round(), width)
    return tall.clamp(min=1), wide.clamp(min=1)


def centre_boxes(size: Tensor) -> Tensor:
    """The largest centred square of each image, placed as torchvision's center_crop: int64 [B, 4]."""
    side = size.amin(1, keepdim=True)
    corner = ((size - side).double() / 2).round().long()
    return torch.cat([corner, side, side], 1)


def to_canvas(boxes: Tensor, size: Tensor, canvas: int) -> Tensor:
    """The same boxes, [B, 4], on the canvas: images of `size` [B, 2] squashed to canvas × canvas pixels.

    Edges are rounded to whole pixels of the canvas, at least one apart; an image that has the canvas' size keeps its
    box.
    """
    ratio = canvas / size.double()
    near = (boxes[:, :2] * ratio).round().long().clamp(max=canvas - 1)
    far = ((boxes[:, :2] + boxes[:, 2:]) * ratio).round().long()
    return torch.cat([near, torch.maximum(far - near, torch.ones_like(near))], 1)


def resample(pixels: Tensor, boxes: Tensor, flip: Tensor, side: int, sent: Tensor | None = None) -> Tensor:
    """Crop, resize (bilinear, antialiased) and flip: uint8 [B, 3, S, S] to float32 [B, 3, side, side] in [0, 1].

    `boxes` is int64 [B, 4] in pixels of the canvas and `flip` bool [B], both on the CPU; `sent` is `placement(boxes,
    flip)` where it is on the device already. As in torchvision's `resized_crop(antialias=True)` a pixel outside the
    box counts for nothing. Products on a GPU and for small images, else one image at a time: equal but for rounding
    to 1/255.
    """
    return scaled(raw(pixels, boxes, flip, side, sent))


def raw(pixels: Tensor, boxes: Tensor, flip: Tensor, side: int, sent: Tensor | None = None) -> Tensor:
    """As `resample`, before the division by 255: uint8 by slices, float32 or (on CUDA) float16 by products."""
    if pixels.device.type == "cpu" and pixels.shape[-1] * side > LARGEST_PRODUCT:
        return slices(pixels, boxes, flip, side)
    where = placement(boxes, flip) if sent is None else sent
    return products(pixels, where.to(pixels.device), side)


def scaled(images: Tensor) -> Tensor:
    """What `raw` gives, 0 to 255, as float32 in [0, 1]; may be done in place."""
    # weights sum to 1 up to rounding, so white may come as 255.00001
    return images.float().mul_(1 / 255).clamp_(0.0, 1.0)


def placement(boxes: Tensor, flip: Tensor) -> Tensor:
    """Boxes and flips as `products` takes them: float32 [B, 5]."""
    return torch.cat([boxes, flip[:, None]], 1).float()


def products(pixels: Tensor, where: Tensor, side: int, precision: torch.dtype | None = None) -> Tensor:
    """Crop, resize and flip are linear and separable: A_y · image · A_xᵀ, two batched products for many images.

    [B, 3, side, side] in `precision`, 0 to 255 but for rounding; on CUDA float16, which holds every uint8 exactly,
    elsewhere float32. In slices of the batch, so that what lies between stays small.
    """
    if precision is None:
        precision = torch.float16 if pixels.device.type == "cuda" else torch.float32
    room = _ROOM_ON_A_CPU if pixels.device.type == "cpu" else _ROOM
    canvas, width = pixels.shape[-1], pixels.shape[1] * precision.itemsize
    # of one image: its pixels, the rows in two layouts, the result; two matrices of weights while they are made
    each = width * (canvas * canvas + 2 * canvas * side + side * side) + 12 * canvas * side
    most = max(1, room // each)
    if len(pixels) <= most:
        return _product(pixels, where, side, precision)
    parts = zip(pixels.split(most), where.split(most), strict=True)
    return torch.cat([_product(some, placed, side, precision) for some, placed in parts])


def _product(pixels: Tensor, where: Tensor, side: int, precision: torch.dtype) -> Tensor:
    """Products of some images, [b, 3, side, side] in `precision`, 0 to 255 but for rounding."""
    count, channels, canvas, _ = pixels.shape
    down = _weights(where[:, 0], where[:, 2], torch.zeros_like(where[:, 4]), side, canvas).to(precision)
    across = _weights(where[:, 1], where[:, 3], where[:, 4], side, canvas).to(precision)
    # rows × (columns × channels) is how a canvas lies in memory: neither product needs its matrix once per channel
    rows = torch.bmm(down, pixels.permute(0, 2, 3, 1).to(precision).reshape(count, canvas, canvas * channels))
    rows = rows.view(count, side, canvas, channels).permute(0, 3, 1, 2).reshape(count, channels * side, canvas)
    return torch.bmm(rows, across.transpose(1, 2)).view(count, channels, side, side)


def _weights(start: Tensor, length: Tensor, flip: Tensor, side: int, canvas: int) -> Tensor:
    """Antialiased bilinear weights, float32 [B, side, canvas]: a triangle as wide as one output pixel, cut at the box.

    The arithmetic of torch's `interpolate(antialias=True)`: the triangle is centred on the output pixel, has half-width
    max(1, shrinking factor) and is normalised over the pixels inside the box. A flip reverses the rows.
    """
    scale = (length / side).view(-1, 1, 1)
    step = torch.arange(side, device=start.device, dtype=torch.float32)
    step = torch.where(flip[:, None] > 0, side - 1 - step, step)
    offset = torch.arange(canvas, device=start.device, dtype=torch.float32) - start.view(-1, 1, 1)
    inside = (offset >= 0) & (offset < length.view(-1, 1, 1))
    # in place from here on: on a GPU this is the largest thing that lies between pixels and views
    weight = offset + 0.5 - (step[:, :, None] + 0.5) * scale
    weight.abs_().div_(-scale.clamp(min=1)).add_(1.0).clamp_(min=0.0).mul_(inside)
    return weight.div_(weight.sum(2, keepdim=True))


def slices(pixels: Tensor, boxes: Tensor, flip: Tensor, side: int) -> Tensor:
    """One image after the other through torch's uint8 kernel, which on a CPU beats the products for large outputs."""
    views = torch.empty(len(pixels), pixels.shape[1], side, side, dtype=torch.uint8)
    where, turns = boxes.tolist(), flip.tolist()

    def some(rows: slice) -> None:
        parts = zip(pixels[rows].split(1), where[rows], turns[rows], views[rows].split(1), strict=True)
        for image, box, turn, view in parts:
            view.copy_(sliced(image, box, turn, side))

    pool.share(some, len(pixels))
    return views


def sliced(image: Tensor, box: Sequence[int], flip: bool, side: int) -> Tensor:
    """One image, uint8 [1, 3, S, S] on the CPU, cropped to its box, resized and flipped: uint8 [1, 3, side, side]."""
    top, left, height, width = box
    inside = image[:, :, top : top + height, left : left + width]
    view = F.interpolate(inside, (side, side), mode="bilinear", antialias=True)
    return view.flip(-1) if flip else view
