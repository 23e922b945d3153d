"""Titles, captions and tags of items: wording drawn at random, content true to the rendered video.

A text is joined by Arrow from small dictionaries of words, so that a million items cost no Python
per item. Knows the catalogue and no pixels.
"""

from __future__ import annotations

from string import Formatter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.data.simulator import world as w

Array = np.ndarray

_TEXTURES = {
    "waves": "gentle waves",
    "dunes": "rolling dunes",
    "clouds": "soft clouds",
    "ripples": "round ripples",
    "checks": "a blurred checkerboard",
    "mist": "thick mist",
    "marble": "veined marble",
    "stripes": "soft stripes",
}
_TOWARDS = {
    "right": "to the right",
    "down-right": "down to the right",
    "down": "downwards",
    "down-left": "down to the left",
    "left": "to the left",
    "up-left": "up to the left",
    "up": "upwards",
    "up-right": "up to the right",
}
_MOVES = {"slow": ("drifts slowly", "drifting slowly"), "fast": ("races", "racing")}

CAPTIONS = (
    "A {size} {colour} {shape} {moves} over {texture} in this {seconds}-second clip.",
    "{article} {seconds}-second clip of a {size} {colour} {shape} {moving} across {texture}.",
    "Over {texture}, a {size} {colour} {shape} {moves} for {seconds} seconds.",
    "Watch a {size} {colour} {shape} {moving} over {texture} for {seconds} seconds.",
    "In front of {texture}, a {size} {colour} {shape} {moves}; the clip lasts {seconds} seconds.",
    "We see {texture} and a {size} {colour} {shape} {moving} for {seconds} seconds.",
    "The camera rests on {texture} for {seconds} seconds while a {size} {colour} {shape} {moves}.",
    "Part {episode} of a series: a {size} {colour} {shape} {moves} over {texture}, in {seconds} "
    "seconds.",
)
TITLES = (
    "{Colour} {shape} on {scene}, part {episode}",
    "{Scene}: {colour} {shape} {episode}",
    "The {speed} {colour} {shape} #{episode}",
    "{Colour} {shape} going {direction}, part {episode}",
)


def _dictionaries() -> dict[str, pa.Array]:
    directions, speeds = list(w.DIRECTIONS), list(w.SPEEDS)
    # Index of a motion: direction + number of directions × speed.
    motions = [(d, s) for s in speeds for d in directions]
    words = {
        "size": list(w.SIZES),
        "colour": list(w.COLOURS),
        "shape": list(w.SHAPES),
        "texture": [_TEXTURES[t] for t in w.TEXTURES],
        "scene": list(w.TEXTURES),
        "direction": directions,
        "speed": speeds,
        "moves": [f"{_MOVES[s][0]} {_TOWARDS[d]}" for d, s in motions],
        "moving": [f"{_MOVES[s][1]} {_TOWARDS[d]}" for d, s in motions],
        # A number of half seconds is the index.
        "seconds": [f"{half / 2:g}" for half in range(121)],
        "article": [_article(f"{half / 2:g}") for half in range(121)],
    }
    words["Colour"] = [word.capitalize() for word in words["colour"]]
    words["Scene"] = [word.capitalize() for word in words["scene"]]
    return {name: pa.array(values, pa.string()) for name, values in words.items()}


def _article(number: str) -> str:
    return "An" if number.startswith("8") or number.split(".")[0] in ("11", "18") else "A"


def texts(world: w.World, tree: Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Titles, captions (string) and tags (list of string) of items at tree positions [n]."""
    motif = world.item_motif[tree]
    topic = world.item_topic[tree]
    motion = world.motif_direction[motif] + len(w.DIRECTIONS) * world.motif_speed[motif]
    texture = world.texture[world.theme_of_topic[topic]]
    half_seconds = np.rint(2 * world.duration_s[tree]).astype(np.int64)
    index = {
        "size": world.size[tree],
        "colour": world.item_colour[tree],
        "Colour": world.item_colour[tree],
        "shape": world.shape[topic],
        "texture": texture,
        "scene": texture,
        "Scene": texture,
        "direction": world.motif_direction[motif],
        "speed": world.motif_speed[motif],
        "moves": motion,
        "moving": motion,
        "seconds": half_seconds,
        "article": half_seconds,
    }
    words = _dictionaries()
    columns = {name: words[name].take(pa.array(index[name])) for name in index}
    columns["episode"] = pa.array(world.episode[tree]).cast(pa.string())
    template = world.template[tree].astype(np.int64)
    return (
        _fill(TITLES, template // len(CAPTIONS) % len(TITLES), columns),
        _fill(CAPTIONS, template % len(CAPTIONS), columns),
        _tags(columns),
    )


def _fill(templates: tuple[str, ...], choice: Array, columns: dict[str, pa.Array]) -> pa.Array:
    parts, rows = [], []
    for number, template in enumerate(templates):
        mine = np.flatnonzero(choice == number)
        pieces: list[pa.Array | pa.Scalar] = []
        for literal, field, _, _ in Formatter().parse(template):
            pieces.append(pa.scalar(literal))
            if field is not None:
                pieces.append(columns[field].take(pa.array(mine)))
        parts.append(pc.binary_join_element_wise(*pieces, pa.scalar("")))
        rows.append(mine)
    back = np.argsort(np.concatenate(rows), kind="stable")
    return pa.concat_arrays(parts).take(pa.array(back))


def _tags(columns: dict[str, pa.Array]) -> pa.Array:
    """Scene, shape, colour, motion, speed and size of each item."""
    moving = pc.binary_join_element_wise(pa.scalar("moving"), columns["direction"], pa.scalar("-"))
    each = [
        columns["scene"],
        columns["shape"],
        columns["colour"],
        moving,
        columns["speed"],
        columns["size"],
    ]
    n, width = len(moving), len(each)
    interleave = np.arange(n * width).reshape(width, n).T.ravel()
    flat = pa.concat_arrays(each).take(pa.array(interleave))
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * width), flat)
