"""What ShapeNet calls its categories and their parts, and which licence all of its shapes are under."""

from bisect import bisect_right
from typing import Final

import numpy as np
from jaxtyping import Int16

from datastore.sources import ShapeError

SHAPENET_LICENCE: Final = "ShapeNet terms of use: non-commercial research and education"

# The 55 categories of ShapeNetCore, each by the first of its names in ShapeNet's taxonomy.
CATEGORY_OF_SYNSET: Final = {
    "02691156": "airplane", "02747177": "ashcan", "02773838": "bag", "02801938": "basket", "02808440": "bathtub",
    "02818832": "bed", "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle",
    "02880940": "bowl", "02924116": "bus", "02933112": "cabinet", "02942699": "camera", "02946921": "can",
    "02954340": "cap", "02958343": "car", "02992529": "cellular telephone", "03001627": "chair", "03046257": "clock",
    "03085013": "computer keyboard", "03207941": "dishwasher", "03211117": "display", "03261776": "earphone",
    "03325088": "faucet", "03337140": "file", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
    "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorcycle", "03797390": "mug", "03928116": "piano",
    "03938244": "pillow", "03948459": "pistol", "03991062": "pot", "04004475": "printer", "04074963": "remote control",
    "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove",
    "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train", "04530566": "vessel",
    "04554684": "washer",
}  # fmt: skip

# ShapeNetPart: 16 categories, and the first of each one's parts, which are counted through all of them.
PART_CATEGORIES: Final = (
    "Airplane", "Bag", "Cap", "Car", "Chair", "Earphone", "Guitar", "Knife", "Lamp", "Laptop", "Motorbike", "Mug",
    "Pistol", "Rocket", "Skateboard", "Table",
)  # fmt: skip
_FIRST_PARTS: Final = (0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47)
_NUM_PARTS: Final = 50

NUM_SHAPENETPART_SHAPES: Final = {"train": 12_137, "val": 1_870, "test": 2_874}


def _part_name(part: int) -> str:
    category = bisect_right(_FIRST_PARTS, part) - 1
    return f"{PART_CATEGORIES[category]}/{part - _FIRST_PARTS[category]}"


PART_NAMES: Final = tuple(_part_name(part) for part in range(_NUM_PARTS))
"""Of all parts by their number: the category, and the part's number in it, as nobody has named them."""


def checked_parts(parts: np.ndarray, label: int, where: str) -> Int16[np.ndarray, " n"]:
    """Each point's part. ShapeError where one of them is no number of a part of the shape's category."""
    first = _FIRST_PARTS[label]
    end = (*_FIRST_PARTS, _NUM_PARTS)[label + 1]
    is_good = (parts >= first) & (parts < end) & (parts == np.floor(parts))
    if not is_good.all():
        row = int(np.argmin(is_good))
        raise ShapeError(
            f"{where}: point {row} is of part {parts[row]:g}, and {PART_CATEGORIES[label]} has parts {first} to {end - 1}: fetch it again"
        )
    return parts.astype(np.int16)
