"""What `data.augment` says: how training images are changed at random, one after the other. No torch."""

from dataclasses import dataclass

from zsplit.config.spec import Stretch, unknown
from zsplit.errors import ConfigError

KEY = "data.augment"


@dataclass(frozen=True)
class Crop:
    """A random window of the image's own size, after `pad` black pixels were put around it."""

    pad: int


@dataclass(frozen=True)
class Flip:
    """Left and right change places in every other image."""


@dataclass(frozen=True)
class ResizedCrop:
    """A random window of any size, brought to the size of `model.input`."""


Change = Crop | Flip | ResizedCrop

FORMS = {
    "crop": "crop:pad=P with a whole number above 0, such as crop:pad=4",
    "flip": "flip",
    "resized_crop": "resized_crop",
}


def parse_augment(text: str) -> tuple[Change, ...]:
    """Return the changes that a text such as `crop:pad=4+flip` names; none for `none`.

    Raises `ConfigError`, which points at what cannot be read, and where a change is named twice.
    """
    if text == "none":
        return ()
    changes: list[Change] = []
    at = 0
    for term in text.split("+"):
        changes.append(_parsed(text, at, term))
        at += len(term) + 1
    kinds = [type(change) for change in changes]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f'{KEY} = "{text}" names a change twice: name each once.')
    if ResizedCrop in kinds[1:]:
        raise ConfigError(f'{KEY} = "{text}" changes images before they have one size: put resized_crop first.')
    return tuple(changes)


def _parsed(text: str, at: int, term: str) -> Change:
    name, _, rest = term.partition(":")
    if name not in FORMS:
        raise unknown(KEY, text, name, ["none", *FORMS])
    stretch = Stretch(KEY, text, at + min(len(name) + 1, len(term)), rest, FORMS[name])
    if name == "crop":
        return Crop(int(stretch.parameter("pad", int)))
    stretch.nothing()
    return Flip() if name == "flip" else ResizedCrop()
