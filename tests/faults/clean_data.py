"""Small clean data in each public format, and ways of writing it that mean the same."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.data.contracts import TIMESTAMP

USERS, ITEMS, ROWS, DAYS = 60, 40, 1200, 60
FIRST = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
DAY_MS = 86_400_000

Tables = dict[str, pa.Table]


def clean_tables() -> Tables:
    """Two months of a small platform: sorted by time, in UTC, every rule kept.

    Ids of items are ids of users, too: a mix-up of the two is the harder to see.
    """
    random = np.random.default_rng(0)
    user = np.concatenate([np.arange(USERS), random.integers(0, USERS, ROWS - USERS)])
    item = np.concatenate([np.arange(ITEMS), random.integers(0, ITEMS, ROWS - ITEMS)])
    random.shuffle(item)
    first = int(FIRST.timestamp() * 1000)
    moment = first + np.sort(random.integers(0, DAYS * DAY_MS, ROWS))
    length = random.integers(5, 60, ITEMS).astype(np.float32)
    watched = np.where(random.random(ROWS) < 0.1, 0, length[item] * random.random(ROWS) * 1.3)
    return {
        "interactions": pa.table(
            {
                "user_id": user,
                "item_id": item,
                "timestamp": pa.array(moment).cast(TIMESTAMP),
                "date": pa.array((moment // DAY_MS).astype(np.int32)).cast(pa.date32()),
                "watch_time_s": pa.array(watched, pa.float32()),
                "duration_s": pa.array(length[item]),
                "click": random.random(ROWS) < 0.5,
                "like": random.random(ROWS) < 0.1,
            }
        ),
        "items": pa.table(
            {
                "item_id": np.arange(ITEMS),
                "title": [f"Video {n} of a cat" for n in range(ITEMS)],
                "tags": pa.array([["cats", f"genre {n % 5}"] for n in range(ITEMS)]),
                "author_id": np.arange(ITEMS) % 9,
                "duration_s": pa.array(length),
            }
        ),
        "users": pa.table(
            {
                "user_id": np.arange(USERS),
                "city": [f"city {n % 4}" for n in range(USERS)],
                "age": np.arange(USERS) % 50 + 15,
            }
        ),
    }


def write(folder: Path, tables: Tables, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", **options)
    return folder


def write_tables(folder: Path) -> Path:
    return write(folder, clean_tables())


LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
EARLY, LATE = (f"log_standard_{days}_pure.csv" for days in ("4_08_to_4_21", "4_22_to_5_08"))
VIDEOS, PEOPLE = "video_features_basic_pure.csv", "user_features_pure.csv"


def log_lines(first_day: datetime.date, days: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    beijing = datetime.timezone(datetime.timedelta(hours=8))
    midnight = datetime.datetime.combine(first_day, datetime.time(), beijing)
    start = int(midnight.timestamp() * 1000)
    lines = []
    for number, moment in enumerate(np.sort(random.integers(0, days * DAY_MS, 200))):
        day = first_day + datetime.timedelta(days=int(moment) // DAY_MS)
        length = 5000 + 1000 * (number % 30)
        values = dict.fromkeys(LOG.split(","), 0) | {
            "user_id": number % 50,
            "video_id": int(random.integers(0, 30)),
            "date": f"{day:%Y%m%d}",
            "time_ms": start + int(moment),
            "is_click": int(random.integers(0, 2)),
            "is_like": int(random.random() < 0.1),
            "long_view": int(random.integers(0, 2)),
            "play_time_ms": int(random.integers(0, length)),
            "duration_ms": length,
        }
        lines.append(",".join(map(str, values.values())))
    return lines


def write_kuairand(folder: Path) -> Path:
    """The published csv files of KuaiRand-Pure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, day, days in (
        (EARLY, datetime.date(2022, 4, 8), 14),
        (LATE, datetime.date(2022, 4, 22), 17),
    ):
        write_lines(folder / name, [LOG, *log_lines(day, days, days)])
    videos = [f'{n},{n % 7},NORMAL,{1000 * (5 + n)},"{n % 5},43"' for n in range(30)]
    write_lines(folder / VIDEOS, ["video_id,author_id,video_type,video_duration,tag", *videos])
    people = [f"{n},full_active,0,{n % 2},1" for n in range(50)]
    head = "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author"
    write_lines(folder / PEOPLE, [head, *people])
    return folder


REVIEWS, METAS = "reviews_Tools_5.json.gz", "meta_Tools.json.gz"


def write_amazon(folder: Path) -> Path:
    """Published reviews and product data, in gzip."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(5)
    reviews = [
        json.dumps(
            {
                "reviewerID": f"A{number % 40:04d}",
                "asin": f"B{int(random.integers(0, 30)):04d}",
                "overall": float(random.integers(1, 6)),
                "unixReviewTime": 1_400_000_000 + 86_400 * number,
            }
        )
        for number in range(300)
    ]
    metas = [
        json.dumps({"asin": f"B{n:04d}", "title": f"Tool {n}", "categories": [["Tools"]]})
        for n in range(30)
    ]
    for name, lines in ((REVIEWS, reviews), (METAS, metas)):
        (folder / name).write_bytes(
            gzip.compress("".join(f"{x}\n" for x in lines).encode(), mtime=0)
        )
    return folder


def write_movielens(folder: Path) -> Path:
    """The files of ML-1M."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(6)
    movie, stars = random.integers(0, 30, 400), random.integers(1, 6, 400)
    ratings = [f"{n % 40}::{movie[n]}::{stars[n]}::{970_000_000 + 3600 * n}" for n in range(400)]
    write_lines(folder / "ratings.dat", ratings)
    movies = "".join(f"{n}::Naïve film {n} (1999)::Drama|Comedy\n" for n in range(30))
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    write_lines(folder / "users.dat", [f"{n}::F::25::{n % 20}::48067" for n in range(40)])
    return folder


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), newline="")


WRITERS = {
    "tables": write_tables,
    "kuairand": write_kuairand,
    "amazon": write_amazon,
    "movielens": write_movielens,
}
