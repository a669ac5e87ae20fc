"""What the classes of a dataset are called, in the order of their labels."""

from pathlib import Path

from zsplit.config import Config

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""`batches.meta` of CIFAR-10."""

_FINE_LABELS = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

CIFAR100 = tuple(_FINE_LABELS.split())
"""`fine_label_names` of CIFAR-100's `meta`."""


NAMES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
"""By dataset."""


def class_names(config: Config) -> tuple[str, ...]:
    """Return the names of the classes; nothing where they have none but their numbers, or nobody knows them.

    Those of `imagefolder` are the folders in `data.path`, where that is on this machine.
    """
    if config.data.name != "imagefolder":
        return NAMES.get(config.data.name, ())
    folder = Path(config.data.path).expanduser() / "train"
    return tuple(sorted(each.name for each in folder.iterdir() if each.is_dir())) if folder.is_dir() else ()
