"""Renders an item as a video: one shape in steady motion on a smooth grey texture, h264 in mp4.

The frame is a torus: what leaves on one side comes back on the other, so that the motion keeps its
direction and speed for the whole clip. All colour belongs to the shape; the background is grey.
Videos of the same item are equal bit by bit on one machine (one encoder thread, no dates).

Shapes: S pixels a side; coordinates run from 0 to 1 over the frame, x to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from components.data.simulator import world as w
from components.pipeline.errors import StageError

Array = np.ndarray

#: sRGB of COLOURS, far apart in hue (degrees): 0, 30, 57, 120, 180, 230, 280, 325.
RGB: dict[str, tuple[int, int, int]] = {
    "red": (230, 20, 20),
    "orange": (250, 130, 10),
    "yellow": (245, 235, 15),
    "green": (20, 190, 20),
    "cyan": (15, 225, 225),
    "blue": (20, 55, 235),
    "purple": (150, 20, 220),
    "pink": (255, 70, 178),
}
_DARKEST, _BRIGHTEST = 60.0, 185.0
# Y, U and V of ITU-R BT.601 for 8 bits: weights of R, G and B, and what is added.
_FROM_RGB = tuple(
    (np.array(weights, dtype=np.float32) / 255, np.float32(offset))
    for weights, offset in (
        ((65.481, 128.553, 24.966), 16),
        ((-37.797, -74.203, 112.0), 128),
        ((112.0, -93.786, -18.214), 128),
    )
)


def start_and_velocity(world: w.World, item_id: int) -> tuple[Array, Array]:
    """Centre of the shape at time 0 and its velocity in frame widths per second, (x, y) each."""
    tree = int(world.by_id[item_id - 1])
    motif = int(world.item_motif[tree])
    step = np.array(list(w.DIRECTIONS.values())[world.motif_direction[motif]], dtype=np.float64)
    speed = list(w.SPEEDS.values())[world.motif_speed[motif]]
    rng = w.generator(world.seed, w.RENDER, item_id)
    return rng.random(2), speed * step / np.linalg.norm(step)


def frames(world: w.World, item_id: int) -> Iterator[Array]:
    """Frames [S, S, 3] uint8 RGB of an item."""
    config, tree = world.config, int(world.by_id[item_id - 1])
    topic = int(world.item_topic[tree])
    shape = w.SHAPES[world.shape[topic]]
    texture = w.TEXTURES[world.texture[world.theme_of_topic[topic]]]
    radius = list(w.SIZES.values())[world.size[tree]]
    colour = np.array(RGB[w.COLOURS[world.item_colour[tree]]], dtype=np.float32)
    start, velocity = start_and_velocity(world, item_id)
    rng = w.generator(world.seed, w.RENDER, item_id)
    rng.random(2)  # the start position

    axis = (np.arange(config.video_size, dtype=np.float32) + 0.5) / config.video_size
    x, y = np.meshgrid(axis, axis)
    grey = _DARKEST + (_BRIGHTEST - _DARKEST) * _texture(texture, x, y, rng)
    background = np.repeat(grey[:, :, None], 3, axis=2).astype(np.float32)
    towards_colour = colour - background
    count = round(float(world.duration_s[tree]) * config.fps)
    for number in range(count):
        cx, cy = (start + velocity * number / config.fps) % 1.0
        dx = (x - np.float32(cx) + 0.5) % 1.0 - 0.5
        dy = (y - np.float32(cy) + 0.5) % 1.0 - 0.5
        # One pixel of soft edge, so that motion below a pixel shows.
        inside = (radius - _distance(shape, dx, dy, radius)) * config.video_size + 0.5
        mask = np.clip(inside, 0.0, 1.0)[:, :, None]
        yield (background + mask * towards_colour + 0.5).astype(np.uint8)


def _distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """A function that is below ``radius`` inside the shape centred at 0, in frame widths."""
    ax, ay = np.abs(x), np.abs(y)
    match shape:
        case "circle":
            return np.hypot(x, y)
        case "square":
            return 1.1 * np.maximum(ax, ay)
        case "triangle":
            return 1.6 * np.maximum(y, 0.866 * ax - 0.5 * y)
        case "diamond":
            return 0.85 * (ax + ay)
        case "ring":
            return radius + np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
        case "cross":
            return 0.95 * np.minimum(np.maximum(ax, 3 * ay), np.maximum(3 * ax, ay))
        case "star":
            # Folded into one of ten equal wedges, the star is bounded by one straight edge, from
            # a tip at distance 1 to a notch at distance 0.5.
            wedge = math.pi / 5
            turn = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
            across = (1 - 0.5 * math.cos(wedge)) / (0.5 * math.sin(wedge))
            return 0.85 * np.hypot(x, y) * (np.cos(turn) + across * np.sin(turn))
        case "bar":
            return 0.9 * np.maximum(ax, 2.6 * ay)
    raise ValueError(f"no shape '{shape}'")


def _texture(texture: str, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Luminance [S, S] in 0 … 1, without hard edges; phases drawn from ``rng``."""
    turn = 2 * math.pi
    a, b = turn * rng.random(2)
    match texture:
        case "waves":
            wave = np.sin(turn * (2 * y + 0.12 * np.sin(turn * 2 * x + a)) + b)
        case "dunes":
            wave = np.sin(turn * (1.5 * (x + y) + 0.2 * np.sin(turn * x + a)) + b)
        case "clouds":
            wave = _noise(x, y, rng)
        case "ripples":
            wave = np.sin(turn * 3 * np.hypot(x - 0.5, y - 0.5) + a)
        case "checks":
            wave = np.sin(turn * 2 * x + a) * np.sin(turn * 2 * y + b)
        case "mist":
            wave = 1.4 * y - 0.7 + 0.3 * _noise(x, y, rng)
        case "marble":
            wave = np.sin(turn * 1.5 * x + 1.4 * _noise(x, y, rng) + a)
        case "stripes":
            wave = np.sin(turn * 3 * x + a)
        case _:
            raise ValueError(f"no texture '{texture}'")
    return np.clip(0.5 + 0.5 * wave, 0.0, 1.0)


def _noise(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Smooth noise in about -1 … 1: a few random plane waves of low frequency."""
    wave = np.zeros_like(x)
    for _ in range(6):
        fx, fy = rng.integers(-2, 3, size=2)
        wave += np.cos(2 * math.pi * (fx * x + fy * y + rng.random())).astype(np.float32)
    return wave / 3


def render_videos(
    world: w.World, folder: str | Path, progress: Callable[[int], None] | None = None
) -> int:
    """Write ``<item_id>.mp4`` for the first ``video_items`` ids; ``progress(1)`` after each.

    Returns:
        How many videos were written.

    Raises:
        StageError: the installed PyAV has no h264 encoder.
    """
    count = min(world.config.video_items, world.num_items)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for item_id in range(1, count + 1):
        encode(
            Path(folder) / world.video_name(item_id),
            frames(world, item_id),
            world.config.video_size,
            world.config.fps,
        )
        if progress is not None:
            progress(1)
    return count


def encode(path: Path, images: Iterator[Array], size: int, fps: int) -> None:
    """Write RGB images [S, S, 3] uint8 as h264 in mp4: a key frame a second, no B-frames."""
    import av

    # Its fast code rounds as buffers happen to lie in memory, and its macroblock tree reads beyond
    # small frames: equal images, other bytes.
    exact = {"x264-params": "cpu-independent=1:mbtree=0"}
    options = {"crf": "20", "preset": "veryfast", "bf": "0", "g": str(fps), **exact}
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        try:
            stream = container.add_stream("libx264", rate=fps, options=options)
        except av.codec.codec.UnknownCodecError as error:
            raise StageError(
                "PyAV has no h264 encoder (libx264), so no videos can be rendered",
                where="ingest.simulator.render_videos",
                remedy="install the wheel of av, or set render_videos to false",
            ) from error
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        # More threads would make the bytes depend on the machine.
        stream.codec_context.thread_count = 1
        for image in images:
            frame = av.VideoFrame.from_ndarray(_yuv420(image), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _yuv420(image: Array) -> Array:
    """RGB [S, S, 3] as planes Y, U, V below one another, [S + S/2, S] uint8 (BT.601, studio range).

    FFmpeg's own conversion rounds differently with the alignment of its buffers in memory, so the
    bytes of a video would depend on what the process did before.
    """
    size = image.shape[0]
    pixels = image.reshape(-1, 3).astype(np.float32)
    luma, u, v = ((pixels @ row + offset).reshape(size, size) for row, offset in _FROM_RGB)
    halves = [
        (c[::2, ::2] + c[1::2, ::2] + c[::2, 1::2] + c[1::2, 1::2]).reshape(-1, size) / 4
        for c in (u, v)
    ]
    return (np.concatenate([luma, *halves]) + 0.5).astype(np.uint8)
