"""Augmentations of kornia, which a `[[views]]` table names; applied last, to one image at a time."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sslpre.errors import SslpreError
from sslpre.views.draw import Draw, chosen, uniform


class Extra:
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
