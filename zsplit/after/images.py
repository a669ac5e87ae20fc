"""Image files as a run's model takes them: channels, size and scale as in its training."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zsplit.config import Config
from zsplit.data.fake import DEVIATION, MEAN
from zsplit.data.images import Scale, eight_bits
from zsplit.data.sources import SCALES, normalized
from zsplit.errors import ConfigError, DataError

MODES = {1: "L", 3: "RGB"}
"""Pillow's name of an image of 8 bits with so many channels."""


def scale_of(config: Config, channels: int) -> Scale:
    """Return how pixels of image files, 0 to 255, become the numbers that the model was trained on.

    Raises ConfigError where the data were a script's own, of which nobody knows.
    """
    name = config.data.name
    if name == "fake":
        return normalized(config, Scale(1.0, (float(MEAN),) * channels, (DEVIATION,) * channels))
    if name not in SCALES:
        raise ConfigError(
            f'data.name = "{name}" does not say how images are scaled: read and scale them as the run\'s script does, '
            "and ask the model that `zsplit export` writes."
        )
    return normalized(config, replace(SCALES[name], full=255.0))


def read_images(paths: list[Path], shape: tuple[int, ...], scale: Scale, resize: bool) -> Tensor:
    """Return images of any kind that Pillow reads as the model's input, shape (N, C, H, W).

    `resize` brings an image to the model's size: scaled until it covers it, the middle cut out. Raises ConfigError
    for a model that takes no images, DataError for a file that is no image, or is of another size and not resized.
    """
    if len(shape) != 3 or shape[0] not in MODES:
        raise ConfigError(
            f"The model takes samples of shape {list(shape)}, and images are [1, H, W] or [3, H, W]: ask it in Python."
        )
    return torch.stack([scale(_read(path, shape, resize)) for path in paths])


def _read(path: Path, shape: tuple[int, ...], resize: bool) -> Tensor:
    """Return the pixels of one image, shape (C, H, W), uint8."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = eight_bits(file, MODES[channels])
    except FileNotFoundError as error:
        raise DataError(f"There is no image {path}: check the path.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image that Pillow reads: give one such as a PNG or a JPEG.") from error
    # Pillow's plugins raise each of these for a damaged file, and for one that is far too large.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): give another image.") from error
    if image.size != (width, height):
        if not resize:
            raise DataError(
                f"{path} has {image.width}×{image.height} pixels, the model takes {width}×{height} (width×height): "
                "--resize brings it there."
            )
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    pixels: Tensor = pil_to_tensor(image)
    return pixels
