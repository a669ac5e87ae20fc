"""Image files in a folder for each class, as ImageNet has them: read when they are asked for, small ones only once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zsplit.data.augment import Draws
from zsplit.data.files import Place, damaged
from zsplit.data.images import Data, Images, Scale, eight_bits
from zsplit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# ImageNet's, as torchvision's pretrained models expect them (torchvision.models, "transforms").
IMAGENET = Scale(255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

FILES = "train/CLASS/ and test/CLASS/ (or val/CLASS/) with images in them"

KEPT_BYTES = 2**30
"""Images whose pixels take no more than this in all are kept in memory, once they were read."""

MARGIN = 256, 224
"""Size to which ImageNet's images are brought, and the size of the centre that is shown (Krizhevsky et al. 2012)."""


class Folder(Images):
    """Image files that are brought to one size, `shape` (C, H, W); they lie at `paths`.

    With `fit`, images of another size are resized and their centre is shown; else they are refused.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, shape: tuple[int, ...], fit: bool, scale: Scale = IMAGENET
    ) -> None:
        super().__init__(labels, scale)
        self.paths, self.shape, self.fit = list(paths), shape, fit
        n = len(self.paths)
        small = n * shape[0] * shape[1] * shape[2] <= KEPT_BYTES
        self._kept = torch.empty((n, *shape), dtype=torch.uint8) if small else None
        self._known = torch.zeros(n, dtype=torch.bool)

    def read(self, indices: Tensor, draws: Draws | None) -> Tensor:
        """Return the pixels of the given indices, shape (B, C, H, W), uint8. Raises `DataError`."""
        if draws and draws.resizes:
            return torch.stack([self._window(int(i), draws, at) for at, i in enumerate(indices)])
        if self._kept is None:
            return torch.stack([self._whole(int(i)) for i in indices])
        for index in indices[~self._known[indices]].tolist():
            self._kept[index] = self._whole(index)
            self._known[index] = True
        return self._kept[indices]

    def part(self, indices: Tensor) -> "Folder":
        """Return the images of the given indices alone."""
        paths = [self.paths[index] for index in indices.tolist()]
        return Folder(paths, self.labels[indices], self.shape, self.fit, self.scale)

    def _whole(self, index: int) -> Tensor:
        _, height, width = self.shape

        def fitted(image: "Image") -> "Image":
            if image.size == (width, height):
                return image
            if not self.fit:
                raise DataError(
                    f"{self.paths[index]} has the size {image.height}×{image.width}, other images {height}×{width}: "
                    "set model.input, such as model.input = [3, 224, 224], and all are brought to that size."
                )
            return centre(image, width, height)

        return _pixels(self.paths[index], fitted)

    def _window(self, index: int, draws: Draws, position: int) -> Tensor:
        from PIL.Image import Resampling

        _, height, width = self.shape

        def shown(image: "Image") -> "Image":
            box = draws.window(position, image.width, image.height)
            return image.crop(box).resize((width, height), Resampling.BILINEAR)

        return _pixels(self.paths[index], shown)


def open_imagefolder(place: Place, shape: tuple[int, ...]) -> Data:
    """Return the images of `train/CLASS/` and of `test/CLASS/` or `val/CLASS/`, brought to `shape` (C, H, W).

    An empty shape stands for that of the first image. Raises `DataError` where folders are missing or differ in
    classes, `ConfigError` for a shape that is none of three channels.
    """
    if shape and (len(shape) != 3 or shape[0] != 3):
        raise ConfigError(
            f"model.input = {list(shape)} is no shape of a colour image: set [3, height, width] for imagefolder."
        )
    files, names = _listed(place, ("train",))
    others, there = _listed(place, ("test", "val"))
    if names != there:
        odd = ", ".join(sorted({*names} ^ {*there}))
        raise DataError(f"Training and test images in {place.folder} differ in classes ({odd}): give both the same.")
    size = shape or tuple(_pixels(files[0][0], lambda image: image).shape)
    train, test = (
        Folder([path for path, _ in found], torch.tensor([label for _, label in found]), size, bool(shape))
        for found in (files, others)
    )
    return Data(train, test, size, len(names))


def centre(image: "Image", width: int, height: int) -> "Image":
    """Return an image's centre, after its tighter side was brought to 256/224 of what is shown.

    For squares that is torchvision's `Resize(256)` and `CenterCrop(224)`.
    """
    from PIL.Image import Resampling

    full, shown = MARGIN
    if image.width * height <= image.height * width:
        wide = width * full // shown
        high = wide * image.height // image.width
    else:
        high = height * full // shown
        wide = high * image.width // image.height
    left, top = round((wide - width) / 2), round((high - height) / 2)
    resized = image.resize((wide, high), Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


def _listed(place: Place, names: Sequence[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Return paths and labels of all images in the first of these folders, and the names of the classes."""
    from torchvision.datasets import ImageFolder

    part = next((place.folder / name for name in names if (place.folder / name).is_dir()), None)
    if part is None:
        raise DataError(f"{place.folder} has no {names[0]}/: {place.dataset} needs {place.needs}.")
    try:
        files = ImageFolder(str(part))
    except FileNotFoundError as error:
        raise DataError(f"{part} has a class without images, or none: put images into {part}/CLASS/.") from error
    return files.samples, files.classes


def _pixels(path: str, change: "Callable[[Image], Image]") -> Tensor:
    """Return a file's image, changed, as pixels (3, H, W). Raises `DataError` where it is damaged."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as file:
            pixels: Tensor = pil_to_tensor(change(eight_bits(file, "RGB")))
    except DataError:
        raise
    # Pillow's plugins raise each of these for a damaged file.
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(Path(path), str(error)) from error
    return pixels
