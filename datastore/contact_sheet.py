"""A page of shapes to look at: their points by part, what the cameras see of them, and which points one camera sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from datastore.cameras import CameraRig, camera_frames, project, rig_by_name
from datastore.hidden_points import visibility_of_points
from datastore.layout import Store, StoreAttributes

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

_TILE: Final = 176
_GAP: Final = 12
_MARGIN: Final = 36
_CAPTION: Final = 208
_HEADER: Final = 118
_NUM_VIEWS: Final = 4
_FINER: Final = 3  # points are drawn this much larger and then reduced, which smooths their edges
_ROUNDING: Final = 12
_FIELD_OF_VIEW: Final = 43.0  # room for the discs of the outermost points

_PAGE: Final[Colour] = (246, 245, 242)
_CARD: Final[Colour] = (255, 255, 255)
_INK: Final[Colour] = (38, 42, 48)
_FAINT: Final[Colour] = (134, 139, 147)
_SEEN: Final[Colour] = (234, 111, 44)
_UNSEEN: Final[Colour] = (203, 207, 214)
_PARTS: Final[tuple[Colour, ...]] = (
    (66, 124, 172), (240, 150, 66), (102, 168, 105), (203, 92, 95), (139, 113, 178),
    (98, 182, 190), (214, 130, 170), (150, 120, 92), (190, 178, 72), (120, 128, 140),
)  # fmt: skip
_LOW: Final[Colour] = (44, 90, 150)
_HIGH: Final[Colour] = (250, 196, 96)


def contact_sheet(store: Store, rows: Sequence[int], out: Path) -> None:
    """Writes the page for the given rows of a store as a PNG."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet(store, rows).save(out, format="PNG", optimize=True)


def varied_rows(store: Store, count: int) -> list[int]:
    """Up to `count` rows that show what a store holds: the first shape of each class, evenly over the classes."""
    rows = store.rows()
    labels = store.read("label", rows)
    firsts = rows[np.sort(np.unique(labels, return_index=True)[1])] if len(rows) else rows
    if len(firsts) < count:  # few classes: shapes from all over the store instead
        firsts = rows
    chosen = np.unique(np.linspace(0, len(firsts) - 1, min(count, len(firsts))).round().astype(int))
    return [int(row) for row in firsts[chosen]]


def draw_contact_sheet(store: Store, rows: Sequence[int]) -> "Image.Image":
    """The page: one line a shape."""
    from PIL import Image, ImageDraw

    views = _spread_views(store.attributes.num_views)
    rig = _drawing_rig(store.attributes)
    titles = _titles(store, views)
    width = 2 * _MARGIN + _CAPTION + len(titles) * (_TILE + _GAP)
    height = _HEADER + len(rows) * (_TILE + _GAP) + _MARGIN - _GAP
    page = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(page)
    _draw_header(draw, store, titles)
    for line, row in enumerate(rows):
        top = _HEADER + line * (_TILE + _GAP)
        shape = _read_shape(store, row)
        _draw_caption(draw, shape, top)
        tiles = [_points_tile(shape, shape.colours, rig, views[0])]
        tiles += [_image_tile(shape.views[view]) for view in views]
        if shape.visibility is not None:
            tiles.append(_seen_tile(shape, shape.visibility[:, views[0]], rig, views[0]))
        if "extra_views" in store.fields:
            tiles.append(
                Image.new("RGB", (_TILE, _TILE), _PAGE) if shape.extra_view is None else _image_tile(shape.extra_view)
            )
        for column, tile in enumerate(tiles):
            page.paste(tile, (_tile_left(column), top), _rounded_mask())
    return page


@dataclass(frozen=True)
class _Shape:
    id: str
    class_name: str
    split: str
    points: Float32[np.ndarray, "p 3"]
    normals: Float32[np.ndarray, "p 3"] | None
    colours: UInt8[np.ndarray, "p 3"]
    legend: list[tuple[str, Colour]]
    views: UInt8[np.ndarray, "v h w 3"]
    visibility: Bool[np.ndarray, "p v"] | None
    exact_visibility: Bool[np.ndarray, "p v"] | None  # by rays
    extra_view: UInt8[np.ndarray, "h w 3"] | None

    @cached_property
    def spacing(self) -> float:
        """How far a point usually is from the next."""
        from scipy.spatial import cKDTree

        points = np.unique(self.points, axis=0)  # a small cloud's row repeats its points
        distances, _ = cKDTree(points).query(points, k=2)
        return float(np.median(distances[:, 1])) if len(points) > 1 else 1.0


def _read_shape(store: Store, row: int) -> _Shape:
    label = int(store.read("label", [row])[0])
    split = int(store.read("split", [row])[0])
    points = store.read("points", [row])[0]
    colours = _height_colours(points)
    legend: list[tuple[str, Colour]] = []
    if "part_labels" in store.fields:
        colours, legend = _part_colours(store.read("part_labels", [row])[0], store.part_names)
    elif "colours" in store.fields:
        colours = store.read("colours", [row])[0]
    optional = {name: store.read(name, [row])[0] for name in ("normals", "visibility") if name in store.fields}
    extra = "extra_views" in store.fields and store.read("num_extra_views", [row])[0] > 0
    return _Shape(
        id=str(store.read("id", [row])[0]),
        class_name=store.class_names[label] if label >= 0 else "unlabelled",
        split=store.splits[split],
        points=points,
        normals=optional["normals"].astype(np.float32) if "normals" in optional else None,
        colours=colours,
        legend=legend,
        views=store.read("views", [row])[0],
        visibility=optional.get("visibility"),
        exact_visibility=optional.get("visibility") if store.attributes.visibility_from == "rays" else None,
        extra_view=store.read("extra_views", [row])[0, 0] if extra else None,
    )


def _part_colours(
    labels: np.ndarray, part_names: Sequence[str]
) -> tuple[UInt8[np.ndarray, "p 3"], list[tuple[str, Colour]]]:
    """A colour for each point, and the name of each colour; the largest part has the calmest."""
    parts, counts = np.unique(labels, return_counts=True)
    ordered = [int(part) for part in parts[np.argsort(-counts, kind="stable")]]
    colour_of = {part: _FAINT if part < 0 else _PARTS[place % len(_PARTS)] for place, part in enumerate(ordered)}
    colours = np.array([colour_of[int(label)] for label in labels], dtype=np.uint8)
    # names of parts repeat their class before a slash, which stands in the caption already
    names = ["unknown" if part < 0 else part_names[part].rpartition("/")[2] for part in ordered]
    return colours, [(name, colour_of[part]) for name, part in zip(names, ordered, strict=True)]


def _height_colours(points: Float32[np.ndarray, "p 3"]) -> UInt8[np.ndarray, "p 3"]:
    """Without parts: from blue below to gold on top."""
    height = points[:, 1:2]
    share = (height - height.min()) / max(float(np.ptp(height)), 1e-6)
    colours: UInt8[np.ndarray, "p 3"] = ((1 - share) * np.array(_LOW) + share * np.array(_HIGH)).astype(np.uint8)
    return colours


def _spread_views(num_views: int) -> list[int]:
    return [round(place * num_views / _NUM_VIEWS) for place in range(_NUM_VIEWS)] if num_views >= _NUM_VIEWS else [0]


def _drawing_rig(attributes: StoreAttributes) -> CameraRig:
    """Cameras to draw points with: the store's where it knows them, all of them with perspective."""
    if attributes.rig is None:
        return rig_by_name("azimuth12", _TILE * _FINER)
    known = attributes.rig
    return CameraRig(
        name="sheet",
        azimuths=known.azimuths,
        elevations=known.elevations,
        field_of_view=_FIELD_OF_VIEW,
        image_size=_TILE * _FINER,
    )


def _image_tile(image: UInt8[np.ndarray, "h w 3"]) -> "Image.Image":
    from PIL import Image

    return Image.fromarray(image).resize((_TILE, _TILE), Image.Resampling.BICUBIC)


def _points_tile(shape: _Shape, colours: UInt8[np.ndarray, "p 3"], rig: CameraRig, view: int) -> "Image.Image":
    """The points that one of the rig's cameras sees, as small lit discs, the nearest on top."""
    from PIL import Image, ImageDraw

    seen = _seen_points(shape, rig, view)  # hidden points would shine through the gaps between those in front
    points, colours = shape.points[seen], colours[seen]
    size = rig.image_size
    pixels, depth = project(points, rig)
    facing = np.ones(len(points))
    if shape.normals is not None:
        towards = camera_frames(rig)[0][view] - points
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        facing = np.abs((shape.normals[seen] * towards).sum(axis=1))
    near, far = rig.depth_range
    haze = np.clip((depth[:, view] - near) / (far - near), 0, 1)
    lit = colours * (0.55 + 0.45 * facing)[:, None]
    lit = lit + (255 - lit) * (0.35 * haze)[:, None]

    tile = Image.new("RGB", (size, size), _CARD)
    draw = ImageDraw.Draw(tile)
    # discs just large enough that an evenly covered surface looks closed
    radii = shape.spacing * rig.focal_length / depth[:, view]
    for point in np.argsort(-depth[:, view], kind="stable"):
        (x, y), radius = pixels[point, view], radii[point]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(value) for value in lit[point]))
    return tile.resize((_TILE, _TILE), Image.Resampling.LANCZOS)


def _seen_points(shape: _Shape, rig: CameraRig, view: int) -> Bool[np.ndarray, " p"]:
    """Which points a drawing's camera sees: as the store knows it from rays, else by an estimate from the points."""
    if shape.exact_visibility is not None:
        return shape.exact_visibility[:, view]
    one = rig.model_copy(update={"azimuths": (rig.azimuths[view],), "elevations": (rig.elevations[view],)})
    seen: Bool[np.ndarray, " p"] = visibility_of_points(shape.points, one)[:, 0]
    return seen


def _seen_tile(shape: _Shape, seen: Bool[np.ndarray, " p"], rig: CameraRig, seeing_view: int) -> "Image.Image":
    """Which points one camera sees, from another beside it: from its own place, all that can be seen is seen."""
    from PIL import ImageDraw

    view = _camera_beside(rig, seeing_view)
    colours = np.where(seen[:, None], np.array(_SEEN, np.uint8), np.array(_UNSEEN, np.uint8))
    tile = _points_tile(shape, colours, rig, view)
    positions, rotations = camera_frames(rig)
    across = (rotations[view] @ positions[seeing_view])[:2]
    length = float(np.linalg.norm(across))
    if length > 0.2 * rig.distance:  # else it stands behind the viewer, and there is no side to point to
        _draw_camera_mark(ImageDraw.Draw(tile), across / length)
    return tile


def _camera_beside(rig: CameraRig, view: int) -> int:
    """The camera whose direction is nearest to 60 degrees away from a view's."""
    positions, _ = camera_frames(rig)
    return int(np.argmin(np.abs(positions @ positions[view] / rig.distance**2 - 0.5)))


def _draw_camera_mark(draw: "ImageDraw.ImageDraw", across: np.ndarray) -> None:
    """A small arrow head at the tile's edge, the way the camera looks."""
    side = np.array([-across[1], across[0]])
    base = np.array([_TILE / 2, _TILE / 2]) + across / np.abs(across).max() * (_TILE / 2 - 13)
    corners = [base - across * 11, base + side * 6, base - side * 6]
    draw.polygon([(float(x), float(y)) for x, y in corners], fill=_SEEN, outline=_CARD)


def _titles(store: Store, views: Sequence[int]) -> list[str]:
    """What stands above each column of tiles."""
    coloured_by = "part" if "part_labels" in store.fields else "colour" if "colours" in store.fields else "height"
    titles = [f"points by {coloured_by}", *(f"view {view}" for view in views)]
    titles += [f"seen by camera {views[0]}"] if "visibility" in store.fields else []
    return [*titles, "extra view 0"] if "extra_views" in store.fields else titles


def _draw_header(draw: "ImageDraw.ImageDraw", store: Store, titles: Sequence[str]) -> None:
    attributes = store.attributes
    name = store.url.rstrip("/").rpartition("/")[2]
    draw.text((_MARGIN, 26), name, font=_font(26), fill=_INK)
    made = attributes.rig.name if attributes.rig else "the source's own"
    facts = (
        f"{len(store.rows()):,} shapes · {len(store.class_names)} classes · {attributes.points_per_shape:,} points · "
        f"{attributes.num_views} views of {attributes.image_size} px ({made}) · "
        f"{attributes.source_url} · {attributes.licence}"
    )
    draw.text((_MARGIN, 60), facts, font=_font(13), fill=_FAINT)
    for column, title in enumerate(titles):
        draw.text((_tile_left(column) + 2, _HEADER - 20), title, font=_font(12), fill=_FAINT)


def _draw_caption(draw: "ImageDraw.ImageDraw", shape: _Shape, top: int) -> None:
    draw.text((_MARGIN, top + 6), shape.class_name, font=_font(20), fill=_INK)
    draw.text((_MARGIN, top + 34), f"{shape.id} · {shape.split}", font=_font(12), fill=_FAINT)
    for place, (name, colour) in enumerate(shape.legend[:6]):
        y = top + 62 + 18 * place
        draw.ellipse((_MARGIN, y, _MARGIN + 10, y + 10), fill=colour)
        draw.text((_MARGIN + 17, y - 3), name, font=_font(12), fill=_INK)


def _tile_left(column: int) -> int:
    return _MARGIN + _CAPTION + column * (_TILE + _GAP)


def _rounded_mask() -> "Image.Image":
    from PIL import Image, ImageDraw

    size = _TILE * _FINER
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size - 1, size - 1), _ROUNDING * _FINER, fill=255)
    return mask.resize((_TILE, _TILE), Image.Resampling.LANCZOS)


def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)
