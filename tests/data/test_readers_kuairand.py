"""KuaiRand: the published csv folder and the parquet re-encoding, small copies and the real one."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.contracts import FEEDBACK, INTERACTIONS, ITEMS
from components.data.source import Source, open_source
from components.pipeline.errors import DataContractError

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
)
RANGES = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USERS = ",".join(
    ["user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author"]
    + [f"{name},{name}_range" for name in RANGES]
    + [f"onehot_feat{i}" for i in range(18)]
)
TIME = 1_649_400_000_000


def log_line(user: int, video: int, date: int, time: int, **values: int) -> str:
    columns = dict.fromkeys(LOG.split(","), 0)
    columns |= {"user_id": user, "video_id": video, "date": date, "time_ms": time} | values
    return ",".join(str(value) for value in columns.values())


def published(folder: Path, version: str = "pure") -> Path:
    """A tiny folder in the published layout."""
    data = folder / "data"
    data.mkdir(parents=True)
    part = "_part1" if version == "27k" else ""

    def write(name: str, *lines: str) -> None:
        (data / f"{name}.csv").write_text("\n".join(lines) + "\n")

    write(
        f"log_standard_4_08_to_4_21_{version}{part}",
        LOG,
        log_line(0, 7, 20220408, TIME, is_click=1, play_time_ms=1500, duration_ms=9000),
        log_line(1, 8, 20220409, TIME + 5, long_view=1, is_profile_enter=1),
    )
    write(
        f"log_standard_4_22_to_5_08_{version}{part}",
        LOG,
        log_line(0, 8, 20220501, TIME + 9, is_like=1, is_hate=1, is_comment=1, is_forward=1),
    )
    write(f"log_random_4_22_to_5_08_{version}", LOG, log_line(5, 9, 20220501, TIME, is_rand=1))
    write(
        f"video_features_basic_{version}",
        VIDEOS,
        '7,70,NORMAL,2022-04-10,Web,0.0,87433.0,720.0,1280.0,1,9.0,"20,43"',
        "8,80,AD,2022-04-11,Web,,,,,2,,",
    )
    write(
        f"user_features_{version}",
        USERS,
        '0,full_active,0,-124,1,5,"(0,10]",3,"[1,10)",0,0,99,91-180,'
        + "1,2,3,4,5.0,"
        + ",".join(["6"] * 13),
        "1,UNKNOWN,0,1,0,0,0,0,0,0,0,9,8-14,1,2,3,4,," + ",".join(["7"] * 7) + "," * 6,
    )
    write(f"video_features_statistic_{version}", "video_id,counts", "7,1")
    return folder


def read(source: Source, table: str) -> list[dict[str, Any]]:
    return pa.Table.from_batches(list(source.tables[table]())).to_pylist()


@pytest.mark.parametrize("version", ["pure", "1k", "27k"])
@pytest.mark.parametrize("inside", ["", "data"])
def test_published_folder_gives_contract_rows(tmp_path: Path, version: str, inside: str) -> None:
    source = open_source(str(published(tmp_path, version) / inside))
    rows = read(source, "interactions")
    assert (source.format, source.split["test_from"]) == ("kuairand", "2022-05-01")
    assert [(r["user_id"], r["item_id"]) for r in rows] == [(0, 7), (1, 8), (0, 8)]
    assert [name for name in FEEDBACK if rows[0][name]] == ["click"]
    assert [name for name in FEEDBACK if rows[1][name]] == ["long_view", "profile_enter"]
    assert [n for n in FEEDBACK if rows[2][n]] == ["like", "forward", "comment", "dislike"]
    assert rows[0]["timestamp"].timestamp() * 1000 == TIME
    assert rows[0]["date"] == datetime.date(2022, 4, 8)
    assert (rows[0]["watch_time_s"], rows[0]["duration_s"], rows[0]["rating"]) == (1.5, 9, None)


def test_random_exposure_is_left_out_and_told(tmp_path: Path) -> None:
    source = open_source(str(published(tmp_path)))
    assert 5 not in {row["user_id"] for row in read(source, "interactions")}
    assert any("random exposure is left out" in note for note in source.notes)


def test_features_become_tags_and_categories_and_sentinels_null(tmp_path: Path) -> None:
    source = open_source(str(published(tmp_path)))
    items = read(source, "items")
    assert list(items[0]) == ITEMS.schema.names
    assert [(i["item_id"], i["author_id"], i["tags"]) for i in items] == [
        (7, 70, ["20", "43"]),
        (8, 80, None),
    ]
    assert items[0]["duration_s"] == pytest.approx(87.433)
    assert items[1]["duration_s"] is None
    first, second = read(source, "users")
    assert (first["is_live_streamer"], second["is_live_streamer"]) == (None, 1)
    assert first["follow_user_num_range"] == "(0,10]"
    assert (first["onehot_feat4"], second["onehot_feat4"]) == ("5", None)
    assert (first["onehot_feat17"], second["onehot_feat17"]) == ("6", None)
    assert "follow_user_num" not in first


def test_absent_features_are_derived_from_the_log(tmp_path: Path) -> None:
    folder = published(tmp_path)
    for file in (folder / "data").glob("*_features_*"):
        file.unlink()
    source = open_source(str(folder))
    assert [row["item_id"] for row in read(source, "items")] == [7, 8]
    assert read(source, "users") == [{"user_id": 0}, {"user_id": 1}]


def test_versions_do_not_mix(tmp_path: Path) -> None:
    published(tmp_path / "a", "1k")
    published(tmp_path / "b", "pure")
    for file in (tmp_path / "b" / "data").iterdir():
        file.rename(tmp_path / "a" / "data" / file.name)
    with pytest.raises(DataContractError, match="several versions are here: 1k, pure"):
        open_source(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("harm", "place"),
    [
        (lambda text: text.replace(",20220408,", ",20220431,"), "row 0 column 'date'"),
        (lambda text: text.replace("0,7,", "x7,7,", 1), "line 2 column 'user_id'"),
        (lambda text: text.replace("\n1,8,", "\n1,8,8,"), "line 3"),
        (lambda text: text.replace("is_like", "liked"), ".csv line 1"),
        (lambda text: text.partition("\n")[0] + "\n", ".csv"),
        (lambda text: "", ".csv"),
    ],
    ids=["no such day", "text id", "long line", "missing column", "no rows", "empty"],
)
def test_broken_log_names_file_and_place(tmp_path: Path, harm: Any, place: str) -> None:
    folder = published(tmp_path)
    log = folder / "data" / "log_standard_4_08_to_4_21_pure.csv"
    log.write_text(harm(log.read_text()))
    with pytest.raises(DataContractError) as caught:
        read(open_source(str(folder)), "interactions")
    assert str(caught.value.where).startswith(f"{folder}/data/{log.name}")
    assert str(caught.value.where).endswith(place)
    assert caught.value.remedy


def reencoded(folder: Path) -> Path:
    """A tiny folder in the parquet layout."""
    folder.mkdir()
    columns = {name: [0, 0] for name in LOG.split(",")}
    columns |= {"user_id": [1, 1], "video_id": [7, 9], "date": [20220425, 20220501]}
    columns |= {"time_ms": [TIME + 10_000, TIME + 20_000], "play_time_ms": [500, 0]}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    lists = pa.list_(pa.int32())
    histories = {
        "user_id": pa.array([1, 2], pa.int32()),
        "history_len": [9, 1],
        "last_time_ms": [TIME, TIME + 1],
        "watch_seq": pa.array([[7, 8, 7], [9]], lists),
        "like_seq": pa.array([[7], []], lists),
        "long_watch_seq": pa.array([[3, 8], [7]], lists),
    }
    pq.write_table(pa.table(histories), folder / "user_histories.parquet")
    videos = {"video_id": [7, 9], "author_id": [1, 2], "video_duration": [2500.0, None]}
    pq.write_table(pa.table(videos | {"tag": ["1", None]}), folder / "videos.parquet")
    pq.write_table(pa.table({"user_id": [1, 2]}), folder / "users.parquet")
    return folder


def test_histories_become_events_before_the_log(tmp_path: Path) -> None:
    source = open_source(str(reencoded(tmp_path / "k")))
    rows = read(source, "interactions")
    assert source.rows["interactions"] == len(rows) == 6
    history = rows[:4]
    assert [(r["user_id"], r["item_id"]) for r in history] == [(1, 7), (1, 8), (1, 7), (2, 9)]
    times = [round(r["timestamp"].timestamp() * 1000) for r in history]
    assert times == [TIME - 2000, TIME - 1000, TIME, TIME + 1]
    assert [r["like"] for r in history] == [True, False, True, False]
    assert [r["long_view"] for r in history] == [False, True, False, False]
    assert [r["duration_s"] for r in history] == [2.5, None, 2.5, None]
    # The list gives an order and no day.
    assert {r["date"] for r in history} == {None}
    unknown = {
        "date",
        "click",
        "follow",
        "forward",
        "comment",
        "profile_enter",
        "dislike",
        "watch_time_s",
        "rating",
    }
    assert {name for r in history for name, v in r.items() if v is None} == unknown | {"duration_s"}
    assert [r["watch_time_s"] for r in rows[4:]] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["users", "videos", "user_histories"])
def test_missing_table_of_the_reencoding_is_named(tmp_path: Path, name: str) -> None:
    folder = reencoded(tmp_path / "k")
    file = folder / f"{name}.parquet"
    file.rename(f"{file}.gz")
    with pytest.raises(DataContractError, match=rf"{name}\.parquet is missing"):
        open_source(str(folder))


def test_history_without_lists_is_refused(tmp_path: Path) -> None:
    folder = reencoded(tmp_path / "k")
    table = pq.read_table(folder / "user_histories.parquet")
    joined = table.set_column(4, "like_seq", pa.array(["7", ""]))
    pq.write_table(joined, folder / "user_histories.parquet")
    with pytest.raises(DataContractError, match="column 'like_seq': the column is string"):
        read(open_source(str(folder)), "interactions")


def test_real_counts_signals_and_days(shared_data: Path) -> None:
    source = open_source(str(shared_data / "kuairand_pure"))
    tables = {n: pa.Table.from_batches(list(s())) for n, s in source.tables.items()}
    events = tables["interactions"]
    assert {name: table.num_rows for name, table in tables.items()} == source.rows
    assert source.rows == {"interactions": 817_187 + 228_329, "items": 7_583, "users": 27_285}
    assert events.schema.names == INTERACTIONS.schema.names

    frame = events.to_pandas()
    log, history = frame[frame["date"].notna()], frame[frame["date"].isna()]
    assert log["date"].min() == datetime.date(2022, 4, 25)
    assert history["timestamp"].max() < pd.Timestamp("2022-04-24T16:00Z")
    assert (len(log), len(history)) == (228_329, 817_187)
    assert (log["date"] >= datetime.date(2022, 5, 1)).sum() == 133_545
    for name, rate in {"click": 0.4419, "long_view": 0.3108, "like": 0.0171}.items():
        assert log[name].astype(bool).mean() == pytest.approx(rate, abs=5e-5)
    assert history["click"].isna().all()

    # The last watched video of each user, straight from the file, at its true time.
    given = pq.read_table(shared_data / "kuairand_pure" / "user_histories.parquet").to_pandas()
    last = history.groupby("user_id").last()
    assert last["item_id"].tolist() == [seq[-1] for seq in given["watch_seq"]]
    times = last["timestamp"].astype("int64")
    assert times.tolist() == given["last_time_ms"].tolist()
    for column, signal in {"like_seq": "like", "long_watch_seq": "long_view"}.items():
        expected = sum(
            len([v for v in watched if v in set(marked)])
            for watched, marked in zip(given["watch_seq"], given[column], strict=True)
        )
        assert history[signal].astype(bool).sum() == expected
