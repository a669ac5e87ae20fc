"""Where a dataset's files may lie, and what is said of one that is missing or damaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zsplit.errors import DataError


class Place(NamedTuple):
    """A folder that was named for a dataset, and what has to be in it."""

    dataset: str
    folder: Path
    needs: str

    def find(self, inner: str, names: Sequence[str]) -> Path:
        """Return the first file of these names in `folder/inner` or `folder`. Raises `DataError` without one."""
        found = self.look(inner, names)
        if found is None:
            raise DataError(f"{self.folder} has no {names[0]}: {self.dataset} needs a folder with {self.needs}.")
        return found

    def look(self, inner: str, names: Sequence[str]) -> Path | None:
        """Return the first file of these names in `folder/inner` or `folder`, or None."""
        places = (folder / name for folder in (self.folder / inner, self.folder) for name in names)
        return next((path for path in places if path.is_file()), None)


def open_file(path: Path) -> BinaryIO:
    """Open a file to read. Raises `DataError`."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): mend that.") from error


def damaged(path: Path, why: str) -> DataError:
    """Return the error for a file whose contents are not what they should be."""
    return DataError(f"{path} is damaged ({why}): fetch it again.")
