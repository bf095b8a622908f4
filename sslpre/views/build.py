"""All views of a batch, made on the device from one copy of its pixels, as the recipe's `[[views]]` tables say.

Everything random is drawn first, on the CPU, from (seed, epoch, index, view) alone, and sent over in one copy. So a
view does not depend on the batch that its image is in, and nothing ever waits for the device.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.views import blur, colour, crop
from sslpre.views.draw import Draw, chosen, uniform

if TYPE_CHECKING:
    from sslpre.recipe import View


class Views:
    """Makes every view of a batch: crop and flip, colour jitter, grey, blur, then the table's kornia augmentations.

    `sides` are the sides of the views in recipe order; a table with `copies = 2` makes two, each with draws of its own.
    Raises SslpreError (exit 2) for a kornia entry that cannot be used.
    """

    def __init__(self, tables: Sequence["View"], image_size: int, seed: int):
        self.seed = seed
        self._tables = [table for table in tables for _ in range(table.copies)]
        self.sides = tuple(table.size or image_size for table in self._tables)
        self._extras = [
            [_Extra(entry, side) for entry in table.kornia]
            for table, side in zip(self._tables, self.sides, strict=True)
        ]

    def __call__(self, pixels: Tensor, size: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """Views of one batch: one float32 [B, 3, s, s] in [0, 1] per side, on the device of `pixels`.

        `pixels` is uint8 [B, 3, S, S], images squashed to a square; `size` int64 [B, 2], the height and width each
        had before; `index` int64 [B], each image's position in the data set; the last two on the CPU.
        """
        plans = [self._plan(view, pixels.shape[-1], size, index, epoch) for view in range(len(self.sides))]
        _send(plans, pixels.device)
        # the products must not fall into the caller's bf16
        with torch.autocast(pixels.device.type, enabled=False):
            return [self._make(view, plan, pixels, index, epoch) for view, plan in enumerate(plans)]

    def _plan(self, view: int, canvas: int, size: Tensor, index: Tensor, epoch: int) -> "_Plan":
        table, name, draw = self._tables[view], f"view{view}", partial(uniform, self.seed, epoch, index)
        boxes = crop.draw_boxes(draw(f"{name}.box", crop.NUMBERS), size, table.crop_scale, table.crop_ratio)
        blurred = chosen(draw(f"{name}.blur"), table.blur)
        low, high = table.blur_sigma
        boxes, flip = crop.to_canvas(boxes, size, canvas), draw(f"{name}.flip") < table.flip
        return _Plan(
            boxes=boxes,
            flip=flip,
            placed=crop.placement(boxes, flip),
            jitter=colour.draw_jitter(table, draw, name),
            gray=chosen(draw(f"{name}.gray"), table.gray),
            blurred=blurred,
            sigma=low + (high - low) * draw(f"{name}.sigma")[blurred],
        )

    def _make(self, view: int, plan: "_Plan", pixels: Tensor, index: Tensor, epoch: int) -> Tensor:
        table, side = self._tables[view], self.sides[view]
        images = crop.resample(pixels, plan.boxes, plan.flip, side, plan.placed)
        colour.jitter(images, plan.jitter)
        colour.gray(images, plan.gray)
        blur.blur(images, plan.blurred, plan.sigma, blur.kernel_side(side, table.blur_kernel))
        for place, extra in enumerate(self._extras[view]):
            extra(images, partial(uniform, self.seed, epoch, index), f"view{view}.kornia{place}")
        return images.clamp_(0.0, 1.0)


def centre(pixels: Tensor, size: Tensor, side: int) -> Tensor:
    """The largest centred square of each image, resized (antialiased): float32 [B, 3, side, side] in [0, 1].

    What probes, exports and a method's look at every image see. Arguments as of `Views.__call__`.
    """
    boxes = crop.to_canvas(crop.centre_boxes(size), size, pixels.shape[-1])
    with torch.autocast(pixels.device.type, enabled=False):
        return crop.resample(pixels, boxes, torch.zeros(len(pixels), dtype=torch.bool), side)


@dataclass
class _Plan:
    """Everything random about one view of a batch. `boxes`, `flip` and `sigma` stay on the CPU, the rest is sent."""

    boxes: Tensor
    flip: Tensor
    placed: Tensor
    jitter: colour.Jitter
    gray: Tensor
    blurred: Tensor
    sigma: Tensor


def _send(plans: list[_Plan], device: torch.device) -> None:
    """Move what the device needs of all plans there, so that nothing waits for it later."""
    if device.type == "cpu":
        return
    rows = [tensor for plan in plans for tensor in (plan.jitter.rows, plan.gray, plan.blurred)]
    numbers = [tensor for plan in plans for tensor in (plan.jitter.factors, plan.placed)]
    sent = _in_one_copy(rows + numbers, device)
    for place, plan in enumerate(plans):
        plan.jitter.rows, plan.gray, plan.blurred = sent[3 * place : 3 * place + 3]
        plan.jitter.factors, plan.placed = sent[len(rows) + 2 * place : len(rows) + 2 * place + 2]


def _in_one_copy(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on the device. Wider types come first, so that each begins where its type may begin."""
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()  # a copy from ordinary memory would wait for the work queued before it
    flat = flat.to(device, non_blocking=device.type == "cuda")
    pieces = flat.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


class _Extra:
    """One kornia augmentation of a `[[views]]` table, applied to one image at a time with numbers of that image's own.

    kornia draws from torch's global generators, so each image seeds them, and they are put back afterwards. Whether
    an image is drawn at all (the entry's `p`) is decided here: kornia would compute everything and mix.
    """

    def __init__(self, entry: Mapping[str, Any], side: int):
        arguments = {key: _as_tuple(value) for key, value in entry.items() if key != "name"}
        kind = _kornia_class(entry.get("name"))
        known = inspect.signature(kind.__init__).parameters
        for key in arguments:
            if key not in known:
                near = _nearest(key, [key for key in known if key != "self"])
                raise SslpreError(f"`{kind.__name__}` has no argument `{key}`", near)
        if "p" in known:
            self._probability = arguments.get("p", known["p"].default)
            arguments["p"] = 1.0
        else:
            self._probability = 1.0
        if not isinstance(self._probability, int | float) or not 0 <= self._probability <= 1:
            raise SslpreError(f"`{kind.__name__}` cannot have p = `{self._probability}`", "p is a probability, 0 to 1")
        with torch.random.fork_rng(devices=[]):
            self._augment = _tried(kind, arguments, side)

    def __call__(self, images: Tensor, draw: Draw, name: str) -> None:
        """Augment float images [B, 3, s, s] in place; `draw` and `name` as of the other operations."""
        drawn = chosen(draw(name), float(self._probability)).tolist()
        # two numbers of 24 bits make one seed
        high, low = (draw(f"{name}.seed", 2).double() * 2**24).long().unbind(1)
        seeds = (high * 2**24 + low).tolist()
        device = images.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for row in drawn:
                _seed(seeds[row], device)
                images[row : row + 1] = self._augment(images[row : row + 1].clone())


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _kornia_class(name: Any) -> type[nn.Module]:
    """The augmentation of that name; only those that take one image and leave it an image."""
    import kornia.augmentation as shelf  # seconds to import, and most recipes name nothing from it

    # the last three leave [0, 1], which only the encoder may do, or fetch a diffusion model
    without = {"Normalize", "Denormalize", "RandomDissolving"}
    usable = [
        key
        for key, kind in vars(shelf).items()
        if inspect.isclass(kind) and issubclass(kind, shelf.AugmentationBase2D) and not key.endswith("Base2D")
    ]
    if name in usable and name not in without:
        return getattr(shelf, name)
    if name is None:
        raise SslpreError("a `kornia` entry of `[[views]]` names no class", 'write {name = "RandomSolarize", p = 0.2}')
    if isinstance(name, str) and hasattr(shelf, name):
        hint = "only 2-D augmentations that change one image at a time and keep it in [0, 1] can be used"
        raise SslpreError(f"kornia's `{name}` cannot make a view", hint)
    raise SslpreError(f"kornia has no augmentation `{name}`", _nearest(str(name), sorted(set(usable) - without)))


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.0)
    return f"did you mean `{near[0]}`?" if near else ""


def _as_tuple(value: Any) -> Any:
    """TOML has lists where kornia asks for tuples."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _tried(kind: type[nn.Module], arguments: dict[str, Any], side: int) -> nn.Module:
    """Build the augmentation and try it on a black, a white and a noisy image: mistakes show before training."""
    noise = uniform(0, 0, torch.arange(1), "noise", 3, side, side)
    try:
        augment = kind(**arguments)
        results = [augment(image) for image in (torch.zeros_like(noise), torch.ones_like(noise), noise)]
    except Exception as problem:  # kornia raises whatever it likes; all of it is the entry's fault
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise SslpreError(
            f"kornia's `{kind.__name__}` refuses its arguments: {reason}", "see kornia's manual"
        ) from problem
    for result in results:
        if result.shape != noise.shape:
            got = "×".join(str(length) for length in result.shape[2:])
            raise SslpreError(
                f"`{kind.__name__}` makes {got} of a {side}×{side} view", "set `size` of the table instead"
            )
        if not result.isfinite().all():
            raise SslpreError(f"`{kind.__name__}` makes non-finite pixels", "change its arguments")
    return augment
