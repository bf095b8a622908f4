"""Other libraries, each through its own public interface, measured by `loaders.py` and `step.py`.

Run in the peer's own environment: `PYTHON peers.py loader|step NAME --images DIR --size S --batch B --workers W` waits
on stdin for requests (see turns.py). Everybody makes two SimCLR views with the same settings: crops of 8 to 100 %,
flip, colour jitter 0.8, 0.8, 0.8, 0.2 in 80 %, grey in 20 %, blur in half of the views above 64 px and in none below.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import turns
from ledger import versions

SCALE, JITTER = (0.08, 1.0), (0.8, 0.8, 0.8, 0.2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCHS = 1000  # the data set that many times over, so that no epoch ends while the clock runs


def blurs(size: int) -> bool:
    return size > 64


def lightly(arguments: argparse.Namespace) -> Any:
    """Pillow, torchvision's transforms on Pillow images."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=arguments.size, gaussian_blur=0.5 if blurs(arguments.size) else 0.0)
    return loaded(LightlyDataset(arguments.images, transform=transform), arguments)


def lightly_train(arguments: argparse.Namespace) -> Any:
    """What `lightly_train.pretrain(method="simclr")` builds: torchvision's decoder, albumentations (OpenCV)."""
    from lightly_train._commands import train_helpers
    from lightly_train._data.file_helpers import list_image_filenames_from_dir
    from lightly_train._data.image_dataset import ImageDataset

    wanted: dict[str, Any] = {"image_size": (arguments.size, arguments.size)}
    if not blurs(arguments.size):
        wanted["gaussian_blur"] = None
    transform = train_helpers.get_transform("simclr", train_helpers.get_transform_args("simclr", wanted))
    names = [str(name) for name in list_image_filenames_from_dir(arguments.images)]
    images = ImageDataset(Path(arguments.images), names, transform, 3)
    return train_helpers.get_dataloader(again(images), arguments.batch, arguments.workers, None)


def stable_pretraining(arguments: argparse.Namespace) -> Any:
    """Pillow, torchvision's transforms on Pillow images, a dictionary for every sample."""
    import torchvision
    from stable_pretraining.data import FromTorchDataset
    from stable_pretraining.data import transforms as t

    def view() -> Any:
        steps = [t.RGB(), t.RandomResizedCrop((arguments.size, arguments.size), scale=SCALE)]
        steps += [t.ColorJitter(*JITTER, p=0.8), t.RandomGrayscale(p=0.2)]
        steps += [t.PILGaussianBlur(p=0.5)] if blurs(arguments.size) else []
        return t.Compose(*steps, t.RandomHorizontalFlip(p=0.5), t.ToImage(mean=MEAN, std=STD))

    images = torchvision.datasets.ImageFolder(arguments.images)
    views = t.MultiViewTransform([view(), view()])
    return loaded(FromTorchDataset(images, names=["image", "label"], transform=views), arguments)


def torchvision(arguments: argparse.Namespace) -> Any:
    """torchvision's decoder and its v2 transforms on uint8 tensors."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(arguments.size, SCALE, antialias=True), v2.RandomHorizontalFlip()]
    steps += [v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8), v2.RandomGrayscale(0.2)]
    if blurs(arguments.size):
        steps.append(v2.RandomApply([v2.GaussianBlur(arguments.size // 20 * 2 + 1, (0.1, 2.0))], 0.5))
    view = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    images = ImageFolder(
        arguments.images,
        transform=lambda image: [view(image), view(image)],
        loader=lambda path: decode_image(path, ImageReadMode.RGB),
    )
    return loaded(images, arguments)


LOADERS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "lightly": lightly,
    "lightly-train": lightly_train,
    "stable-pretraining": stable_pretraining,
    "torchvision": torchvision,
}


def again(images: Any) -> Any:
    from torch.utils.data import ConcatDataset

    return ConcatDataset([images] * EPOCHS)


def loaded(images: Any, arguments: argparse.Namespace) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        again(images), batch_size=arguments.batch, shuffle=True, drop_last=True, num_workers=arguments.workers
    )


def shapes(batch: Any, size: int) -> list[list[int]]:
    """The shapes of all views in a batch, however the peer wraps them."""
    import torch

    if isinstance(batch, torch.Tensor):
        return [list(batch.shape)] if batch.ndim == 4 and batch.shape[-1] == size else []
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return [shape for part in parts for shape in shapes(part, size)]


def serve_loader(arguments: argparse.Namespace) -> None:
    loader = LOADERS[arguments.name](arguments)

    def answer(what: str, count: int) -> dict[str, Any]:
        assert what == "views"
        batches = iter(loader)  # its processes start here and end below, so that nothing is made ahead in between
        took, last = turns.window(batches, 1 + turns.AHEAD * arguments.workers, count, arguments.least)
        return {**took, "images": took["batches"] * arguments.batch, "shapes": shapes(last, arguments.size)}

    turns.serve({"name": arguments.name, "versions": known()}, answer)


def serve_step(arguments: argparse.Namespace) -> None:
    """lightly's published SimCLR example (docs.lightly.ai/examples/simclr.html), on a folder, in fp32 as it stands."""
    import torch
    import torchvision
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    assert arguments.name == "lightly"
    resnet = torchvision.models.resnet18()
    backbone = torch.nn.Sequential(*list(resnet.children())[:-1])
    head = SimCLRProjectionHead(512, 512, 128)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)

    def steps() -> Iterator[torch.Tensor]:
        for batch in lightly(arguments):
            first, second = (head(backbone(view).flatten(start_dim=1)) for view in batch[0])
            loss = criterion(first, second)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    trained = steps()  # its loading processes stay, and the window begins when what they made meanwhile is used up

    def answer(what: str, count: int) -> dict[str, Any]:
        assert what == "fp32"
        took, loss = turns.window(trained, 1 + turns.AHEAD * arguments.workers, count)
        return {**took, "images": count * arguments.batch, "loss": loss.item()}

    turns.serve({"name": "lightly", "versions": known()}, answer)


def known() -> dict[str, str]:
    return versions([*LOADERS, "lightly_train", "torch", "pillow", "albumentations", "opencv-python-headless"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("loader", "step"))
    parser.add_argument("name", choices=[*LOADERS])
    parser.add_argument("--images", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--least", type=float, default=0.0, help="seconds that a window of loading takes at least")
    arguments = parser.parse_args()
    (serve_loader if arguments.kind == "loader" else serve_step)(arguments)


if __name__ == "__main__":
    main()
