"""Files of every form, their errors, and both splits against a slow reading of their definition."""

import datetime
import json
import os
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixmem_fast import Catalogue
from prefixmem_fast.recommender.data import Examples, Histories, leave_two_out, load_interactions, split_by_time

pytestmark = pytest.mark.filterwarnings("ignore:interactions .* no time column")

ITEMS = ("10", "11", "x", "13")  # rows 0 .. 3
HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"


@pytest.fixture
def catalogue():
    return Catalogue(ITEMS, torch.arange(4)[:, None])


@pytest.fixture
def load(catalogue, tmp_path):
    """Writes files and reads them: load(("a.csv", "user_id,..."), ("b.csv", ...))."""

    def read(*files):
        for name, content in files:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_interactions([tmp_path / name for name, _ in files], catalogue)

    return read


def by_user(histories):
    assert all(items.dtype == np.int64 for items in histories.items)
    return {user: items.tolist() for user, items in zip(histories.users, histories.items, strict=True)}


def target(user, history, item):
    """A row as MiniOneRec writes it."""
    titles = [f"title, of {h}" for h in history]
    return f'{user},"{titles}","it, too","{history}",{item},"{["<a_1><b_2>"] * len(history)}",<a_1><b_2>\n'


class TestJSON:
    def test_items_are_names_or_numbers(self, load):
        histories = load(("a.json", json.dumps({"b": [10, "x", 11], "a": ["13", 13, 10.0], "none": []})))
        assert by_user(histories) == {"b": [0, 2, 1], "a": [3, 3, 0], "none": []}
        assert histories.users == ["b", "a", "none"]
        assert histories.times is None
        assert len(histories) == 3
        assert histories.interactions == 6

    def test_one_path_is_not_a_list_of_letters(self, catalogue, tmp_path):
        (tmp_path / "a.json").write_text('{"u": ["x"]}')
        for path in (tmp_path / "a.json", str(tmp_path / "a.json")):
            assert by_user(load_interactions(path, catalogue)) == {"u": [2]}

    def test_files_follow_each_other(self, load):
        histories = load(("a.json", '{"u": [10, 11], "v": [13]}'), ("b.json", '{"w": ["x"], "u": [13]}'))
        assert by_user(histories) == {"u": [0, 1, 3], "v": [3], "w": [2]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"u": [10', r"interactions .*a\.json: .*line 1 column 10"),
            (b"\xff\xfe", r"interactions .*a\.json: .*utf-8"),
            ("[[10]]", r'interactions .*a\.json: it holds a list; \{"user": \[item, item, \.\.\.\]\} was expected'),
            ('{"u": [10], "v": [10, "nope"]}', r"a\.json: key 'v': item 'nope' is not in the index; an item named"),
            ('{"u": [12]}', "key 'u': item 12 is not in the index"),
            ('{"u": [10.5]}', "key 'u': item 10.5 is not in the index"),
            ('{"u": [null]}', "key 'u': item None is not in the index"),
            ('{"u": [[10]]}', r"key 'u': item \[10\] is not in the index"),
            ('{"u": "x"}', r"key 'u': 'x' is no list; a list of items in time order was expected"),
            ('{"u": 10}', r"key 'u': 10 is no list; a list of items in time order was expected"),
            ('{"u": null}', r"key 'u': None is no list"),
            ('{"u": {"x": 7}}', r"key 'u': \{'x': 7\} is no list; a list of items in time order was expected"),
            ('{"u": [10], "u": [11]}', "'u' is there twice"),
            ("{}", r"interactions .*a\.json: no user is in it"),
        ],
    )
    def test_errors(self, content, message, load):
        with pytest.raises(ValueError, match=message):
            load(("a.json", content))

    def test_true_is_no_item(self, tmp_path):
        (tmp_path / "a.json").write_text('{"u": [true]}')
        with pytest.raises(ValueError, match="key 'u': item True is not in the index"):
            load_interactions(tmp_path / "a.json", Catalogue(["True", "1"], torch.arange(2)[:, None]))


class TestCSV:
    @pytest.mark.parametrize("user", ["user_id", "user"])
    @pytest.mark.parametrize("item", ["item_id", "item", "item_asin", "parent_asin"])
    def test_rows_in_order(self, user, item, load):
        histories = load(("a.csv", f"rating,{item},{user}\n5,10,u\n3,x,v\n5,11,u\n\n1,10,u\n"))
        assert by_user(histories) == {"u": [0, 1, 0], "v": [2]}
        assert histories.times is None

    @pytest.mark.parametrize("column", ["timestamp", "time"])
    def test_rows_are_sorted_by_time_within_a_user(self, column, load):
        content = f"user_id,item_id,{column}\nu,10,30\nv,x,5\nu,11,2.5\nu,13,30\nu,x,100\nv,10,4\n"
        histories = load(("a.csv", content))
        assert by_user(histories) == {"u": [1, 0, 3, 2], "v": [0, 2]}  # equal times keep the file's order
        assert [times.tolist() for times in histories.times] == [[2.5, 30, 30, 100], [4, 5]]
        assert histories.times[0].dtype == np.float64

    @pytest.mark.parametrize(
        "column", ["Timestamp", "TIME", "ts", "Date", "unix_time", "review_time", "unixReviewTime"]
    )
    def test_columns_of_times_have_many_names(self, column, load):
        histories = load(("a.csv", f"user_id,item_id,rating,{column}\nu,10,5,30\nu,11,5,2\n"))
        assert by_user(histories) == {"u": [1, 0]}
        assert histories.times[0].tolist() == [2, 30]

    def test_timestamp_goes_before_other_names_and_two_others_are_refused(self, load):
        assert by_user(load(("a.csv", "user,item,date,timestamp\nu,10,1,2\nu,11,2,1\n"))) == {"u": [1, 0]}
        with pytest.raises(ValueError, match="columns 'Date', 'ts' all look like times; name one of them timestamp"):
            load(("a.csv", "user,item,Date,ts\nu,10,1,2\n"))

    def test_file_order_is_said_to_stand_for_time(self, load):
        with pytest.warns(UserWarning, match=r"a\.csv: no time column among user_id, item_id, when: file order is"):
            load(("a.csv", "user_id,item_id,when\nu,x,3\n"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(("a.csv", "user_id,item_id,time\nu,x,3\n"))
            load(("a.json", '{"u": [10]}'))
            load(("a.csv", HEADER + target("u", [10], 11)))

    def test_iso_dates(self, load):
        rows = ["u,10,2024-01-02", "u,11,2024-01-01 23:59:59.500", "u,x,2024-01-01T08:00"]
        histories = load(("a.csv", "\n".join(["user,item,date", *rows, ""])))
        assert by_user(histories) == {"u": [2, 1, 0]}
        assert np.diff(histories.times[0]).tolist() == [15 * 3600 + 59 * 60 + 59.5, 0.5]
        zoned = "user,item,date\nu,10,2024-01-01T01:00:00Z\nu,11,2024-01-01T01:30:00+01:00\n"
        assert by_user(load(("a.csv", zoned))) == {"u": [1, 0]}

    @pytest.mark.parametrize(
        ("first", "second", "kinds"),
        [
            ("17", "2024-01-01", "its timestamp is a date without a zone, those before it are a number"),
            ("2024-01-01", "17", "its timestamp is a number, those before it are a date without a zone"),
            (
                "2024-01-01",
                "2024-01-01T00:00Z",
                "its timestamp is a date with a zone, those before it are a date w",
            ),
        ],
    )
    def test_times_of_two_kinds(self, first, second, kinds, load):
        head = "user,item,time\n"
        with pytest.raises(ValueError, match=rf"a\.csv: line 3: {kinds}"):
            load(("a.csv", f"{head}u,10,{first}\nv,10,{second}\n"))
        with pytest.raises(ValueError, match=rf"b\.csv: line 2: {kinds}"):
            load(("a.csv", f"{head}u,10,{first}\n"), ("b.csv", f"{head}v,10,{second}\n"))

    def test_a_column_that_is_there_twice(self, load):
        with pytest.raises(ValueError, match="column 'item_id' is there twice; name each column once"):
            load(("a.csv", "user_id,item_id,item_id\nu,x,10\n"))

    def test_files_are_sorted_together(self, load):
        head = "user_id,item_id,timestamp\n"
        histories = load(("a.csv", head + "u,10,3\n"), ("b.csv", head + "u,11,1\nv,x,9\n"))
        assert by_user(histories) == {"u": [1, 0], "v": [2]}

    def test_a_byte_order_mark_is_no_part_of_a_name(self, load):
        assert by_user(load(("a.csv", b"\xef\xbb\xbfuser_id,item_id\nu,x\n"))) == {"u": [2]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "name,item_id\nu,x\n",
                r"a\.csv: no column for the user; one of user_id, user was expected, found name, item_id",
            ),
            (
                "user_id,thing\nu,x\n",
                "no column for the item; one of item_id, item, item_asin, parent_asin was expected, "
                "found user_id, thing",
            ),
            ("", r"interactions .*a\.csv: no column for the user"),
            ("user_id,item_id\n", r"interactions .*a\.csv: no user is in it"),
            ("user_id,item_id\nu,x\nu\n", r"a\.csv: line 3: it has another number of fields than the header; 2 were"),
            ("user_id,item_id\nu,x,1\n", "line 2: it has another number of fields than the header; 2 were expected"),
            ("user_id,item_id\nu,x\nu,nope\n", r"a\.csv: line 3: item 'nope' is not in the index; an item named there"),
            ("user_id,item_id\nu,\n", "line 2: item '' is not in the index"),
            ("user_id,item_id\n,x\n", "line 2: the user is empty; a name was expected"),
            (
                "user_id,item_id,timestamp\nu,x,1\nu,x,soon\n",
                "line 3: timestamp 'soon' is no number and no ISO date",
            ),
            ("user_id,item_id,timestamp\nu,x,\n", "line 2: timestamp '' is no number"),
            ("user_id,item_id,timestamp\nu,x,nan\n", "line 2: timestamp 'nan' is no number"),
            ("user_id,item_id,timestamp\nu,x,inf\n", "line 2: timestamp 'inf' is no number"),
            (b"user_id,item_id\nu,\xff\n", r"interactions .*a\.csv: .*utf-8"),
            ('user_id,item_id\nu,"x\n' + "u,x\n" * 40_000, r"interactions .*a\.csv: .*field larger than"),
        ],
    )
    def test_errors(self, content, message, load):
        with pytest.raises(ValueError, match=message):
            load(("a.csv", content))

    def test_times_for_all_or_none(self, load):
        with pytest.raises(ValueError, match="user 'u' has 2 items and 1 timestamps; give all or none"):
            load(("a.csv", "user_id,item_id,timestamp\nu,x,1\n"), ("b.csv", "user_id,item_id\nu,10\n"))


class TestMiniOneRec:
    def test_train_valid_test(self, load):
        histories = load(
            ("train.csv", HEADER + target("1", [10], 11) + target("2", [13, 13], 10) + target("1", [10, 11], "13")),
            ("valid.csv", HEADER + target("1", [10, 11, 13], 10) + target("3", [], 11)),
            ("test.csv", HEADER + target("2", [13, 13, 10], 11) + target("3", [11], 10)),
        )
        assert by_user(histories) == {"1": [0, 1, 3, 0], "2": [3, 3, 0, 1], "3": [1, 0]}
        assert histories.times is None

    def test_histories_are_truncated(self, load):
        rows = [target("u", [13, 10], 11), target("u", [10, 11], 10), target("u", [10], 13), target("u", [10, 13], 13)]
        assert by_user(load(("a.csv", HEADER + "".join(rows)))) == {"u": [3, 0, 1, 0, 3, 3]}

    def test_items_are_names(self, load):
        assert by_user(load(("a.csv", HEADER + target("u", ["x", "10"], "x")))) == {"u": [2, 0, 2]}

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                target("u", [10], 11) + target("u", [10], 13),
                r"a\.csv: line 3: the history of user 'u' does not end as the rows before it; .* train, valid, test",
            ),
            (target("u", [10], 11) + target("u", [13, 10, 11], 13), "line 3: the history of user 'u' does not end"),
            (target("u", [10], 11) + target("u", [11, 10], 13), "line 3: the history of user 'u' does not end"),
            (target("u", [10], 11) + target("v", [], 11) + target("u", [], 13), "line 4: the history of user 'u'"),
            (target("u", [10], 12), "line 2: item '12' is not in the index"),
            (target("u", [12], 10), "line 2: item 12 is not in the index"),
            (target("", [10], 11), "line 2: the user is empty; a name was expected"),
            ("u,a,b,10,11,c,d\n", r"line 2: history_item_id = '10'; a list such as \[1, 2\] was expected"),
            ("u,a,b,[10 11],11,c,d\n", r"history_item_id = '\[10 11\]'; a list such as"),
            ("u,a,b,,11,c,d\n", "history_item_id = ''; a list such as"),
            ("u,a,b,{[]: 1},11,c,d\n", "line 2: history_item_id = '{"),
            ("u,a,b,[10],11,c\n", "line 2: it has another number of fields than the header; 7 were expected"),
        ],
    )
    def test_errors(self, rows, message, load):
        with pytest.raises(ValueError, match=message):
            load(("a.csv", HEADER + rows))

    def test_no_user_column(self, load):
        with pytest.raises(ValueError, match="no column for the user; one of user_id, user was expected"):
            load(("a.csv", 'history_item_id,item_id\n"[10]",11\n'))


class TestParquet:
    @pytest.fixture
    def parquet(self, catalogue, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        def read(columns, **options):
            parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", **options)
            return load_interactions(tmp_path / "a.parquet", catalogue)

        return read

    def test_long(self, parquet):
        columns = {"user_id": [1, 2, 1], "item_id": [11, 13, 10], "rating": [1.0, 2.0, 3.0]}
        assert by_user(parquet(columns)) == {"1": [1, 0], "2": [3]}
        histories = parquet({**columns, "timestamp": [9, 3, 2]})
        assert by_user(histories) == {"1": [0, 1], "2": [3]}
        assert [times.tolist() for times in histories.times] == [[2, 9], [3]]

    def test_moments(self, parquet):
        days = [datetime.datetime(2024, 1, day, tzinfo=datetime.timezone.utc) for day in (3, 1, 2)]
        histories = parquet({"user": ["u"] * 3, "item": ["10", "11", "x"], "time": days})
        assert by_user(histories) == {"u": [1, 2, 0]}
        assert np.diff(histories.times[0]).tolist() == [86400, 86400]

    def test_truth_is_no_moment(self, parquet):
        with pytest.raises(ValueError, match=r"row 0: timestamp True is no number and no ISO date"):
            parquet({"user": ["u"] * 2, "item": ["10", "11"], "time": [True, False]})

    def test_moments_without_a_zone_are_the_same_everywhere(self, load, parquet, monkeypatch):
        """At 2:00 of this day the clocks of Berlin go to 3:00."""
        monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        try:
            clock = [datetime.datetime(2024, 3, 31, 2, 30), datetime.datetime(2024, 3, 31, 3, 10)]
            rows = [f"u,{item},{moment}\n" for item, moment in zip((10, 11), clock, strict=True)]
            both = (
                parquet({"user": ["u", "u"], "item": ["10", "11"], "time": clock}),
                load(("a.csv", "".join(["user,item,time\n", *rows]))),
            )
        finally:
            monkeypatch.undo()
            time.tzset()
        for histories in both:
            assert by_user(histories) == {"u": [0, 1]}
            assert np.diff(histories.times[0]).tolist() == [40 * 60]

    @pytest.mark.parametrize("column", ["items", "item_ids", "history"])
    def test_lists(self, column, parquet):
        histories = parquet({"user_id": ["u", "v", "u"], column: [["x", "10"], [], ["11"]]})
        assert by_user(histories) == {"u": [2, 0, 1], "v": []}
        assert by_user(parquet({"user_id": [7], column: [[13, 10]]})) == {"7": [3, 0]}

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (
                {"name": ["u"], "item_id": [10]},
                r"a\.parquet: no column for the user; one of user_id, user was expected, found name, item_id",
            ),
            ({"user_id": ["u"], "thing": [10]}, "no column for the item"),
            ({"name": ["u"], "items": [[10]]}, "no column for the user"),
            ({"user_id": ["u", "u"], "item_id": [10, 12]}, "row 1: item 12 is not in the index"),
            ({"user_id": ["u", None], "item_id": [10, 10]}, "row 1: the user is empty"),
            ({"user_id": ["u", None], "items": [[10], [10]]}, "row 1: the user is empty"),
            ({"user_id": ["u", "v"], "items": [[10], None]}, "row 1: None is no list"),
            ({"user_id": ["u"], "items": ["10"]}, "row 0: '10' is no list"),
            ({"user_id": ["u"], "item_id": [10], "timestamp": ["soon"]}, "row 0: timestamp 'soon' is no number"),
        ],
    )
    def test_errors(self, columns, message, parquet):
        with pytest.raises(ValueError, match=message):
            parquet(columns)

    @pytest.mark.parametrize("column", ["items", "history", "history_item_id"])
    def test_lists_and_targets(self, column, parquet):
        columns = {"user_id": ["u", "v", "u"], column: [[10], ["x"], [10, 11]], "item_id": [11, 13, 10]}
        columns[column] = [[str(item) for item in own] for own in columns[column]]
        assert by_user(parquet(columns)) == {"u": [0, 1, 0], "v": [2, 3]}
        columns[column][2] = ["x", "10"]
        with pytest.raises(ValueError, match="row 2: the history of user 'u' does not end as the rows before it"):
            parquet(columns)

    def test_users_that_are_floats(self, parquet):
        assert by_user(parquet({"user_id": [1.0, 2.0], "item_id": [10, 11]})) == {"1": [0], "2": [1]}
        for user, message in ((float("nan"), "the user is empty"), (1.5, "user 1.5 is neither a name nor a whole")):
            with pytest.raises(ValueError, match=f"row 1: {message}"):
                parquet({"user_id": [1.0, user], "item_id": [10, 11]})

    @pytest.mark.parametrize("unit", ["date32", "date64", "s", "ms", "us", "ns", "ns, UTC"])
    def test_dates_of_every_unit(self, unit, parquet):
        pyarrow = pytest.importorskip("pyarrow")
        kind = getattr(pyarrow, unit)() if unit.startswith("date") else pyarrow.timestamp(*unit.split(", "))
        days = pyarrow.array([datetime.datetime(2024, 1, day) for day in (3, 1)], pyarrow.timestamp("s")).cast(kind)
        if unit == "ns":
            days = pyarrow.array([int(86400e9) * 2 + 1, 1], kind)  # which Python's datetime cannot hold
        histories = parquet({"user": ["u", "u"], "item": ["10", "11"], "time": days})
        assert by_user(histories) == {"u": [1, 0]}
        assert np.diff(histories.times[0]).tolist() == [2 * 86400]

    def test_times_of_day_are_no_times(self, parquet):
        noon = [datetime.time(12)]
        with pytest.raises(ValueError, match=r"column time is of type time64\[us\]; numbers, dates or timestamps were"):
            parquet({"user": ["u"], "item": ["10"], "time": noon})
        with pytest.raises(ValueError, match="row 0: timestamp None is no number"):
            parquet({"user": ["u"], "item": ["10"], "time": [None]})

    def test_rows_are_counted_over_row_groups(self, parquet):
        with pytest.raises(ValueError, match="row 5: item 12 is not in the index"):
            parquet({"user_id": ["u"] * 6, "item_id": [10] * 5 + [12]}, row_group_size=2)

    def test_another_file(self, load):
        pytest.importorskip("pyarrow")
        with pytest.raises(ValueError, match=r"interactions .*a\.parquet: it is no Parquet file"):
            load(("a.parquet", "junk"))


class TestFiles:
    @pytest.mark.parametrize("name", ["none.json", "none.csv", "none.parquet"])
    def test_missing(self, name, catalogue, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=rf"interactions .*{name} is not there; give a \.json, \.csv, \.tsv"
        ):
            load_interactions(tmp_path / name, catalogue)

    @pytest.mark.parametrize("name", ["folder.parquet", "folder"])
    def test_a_folder(self, name, catalogue, tmp_path):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"interactions .*{name} is a folder; give a \.json"):
            load_interactions(tmp_path / name, catalogue)

    @pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
    def test_a_pipe_is_not_waited_for(self, suffix, catalogue, tmp_path):
        os.mkfifo(tmp_path / f"a.{suffix}")
        with pytest.raises(ValueError, match="is a pipe or a device, which cannot be read twice"):
            load_interactions(tmp_path / f"a.{suffix}", catalogue)
        with pytest.raises(ValueError, match="/dev/null is a pipe or a device"):
            load_interactions("/dev/null", catalogue)

    def test_suffixes_in_capitals_and_tabs(self, load):
        assert by_user(load(("A.CSV", "user,item\nu,10\n"), ("b.tsv", "user\titem\nu\tx\n"))) == {"u": [0, 2]}
        assert by_user(load(("A.JSON", '{"u": [10]}'))) == {"u": [0]}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.json", '{"u": ["%s"]}'),
            ("a.json", '{"%s": 7}'),
            ("a.csv", "user_id,item_id\nu,%s\n"),
            ("a.csv", "user_id,item_id,time\nu,x,%s\n"),
            ("a.csv", "%s,item_id\nu,x\n"),
            ("a.csv", HEADER + "u,a,b,%s,11,c,d\n"),
        ],
    )
    def test_an_error_is_no_page(self, name, content, load):
        with pytest.raises(ValueError, match="interactions") as error:
            load((name, content % ("long" * 12_500)))
        assert len(str(error.value)) < 1000
        assert "\n" not in str(error.value)

    def test_deep_json(self, load):
        with pytest.raises(ValueError, match=r"a\.json: it is not JSON .nested too deeply"):
            load(("a.json", '{"u": ' + "[" * 100_000 + "]" * 100_000 + "}"))

    def test_unknown_suffix(self, load):
        with pytest.raises(ValueError, match=r"a\.txt: its name ends in \.txt; \.json, .* or \.parquet was expected"):
            load(("a.txt", "u x"))

    def test_no_file(self, catalogue):
        with pytest.raises(ValueError, match=r"interactions names no file; give a \.json, .* or \.parquet file"):
            load_interactions([], catalogue)

    def test_the_wrong_one_of_several_is_named(self, load):
        with pytest.raises(ValueError, match=r"interactions [^ ]*b\.csv: line 2: item 'nope'"):
            load(("a.json", '{"u": [10]}'), ("b.csv", "user_id,item_id\nu,nope\n"))
        with pytest.raises(ValueError, match=r"interactions .*a\.json, .*b\.json: no user is in it"):
            load(("a.json", "{}"), ("b.json", "{}"))

    def test_forms_mix(self, load):
        histories = load(
            ("a.json", '{"u": [10]}'),
            ("b.csv", "user_id,item_id\nu,x\n"),
            ("c.csv", HEADER + target("u", [10, "x"], 11)),
        )
        assert by_user(histories) == {"u": [0, 2, 1]}


def as_tuples(examples):
    assert examples.targets.dtype == np.int64
    assert len(examples) == len(examples.users) == len(examples.histories)
    return [
        (user, tuple(history.tolist()), int(target))
        for user, history, target in zip(examples.users, examples.histories, examples.targets, strict=True)
    ]


HISTORIES = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6)


class TestLeaveTwoOut:
    def test_by_hand(self):
        items = [[4], [5, 6], [7, 8, 9], [1, 2, 3, 2, 1], []]
        split = leave_two_out(Histories(list("abcde"), [np.array(i, dtype=np.int64) for i in items]))
        assert by_user(split.train) == {"a": [4], "b": [5, 6], "c": [7], "d": [1, 2, 3], "e": []}
        assert as_tuples(split.validation) == [("c", (7,), 8), ("d", (1, 2, 3), 2)]
        assert as_tuples(split.test) == [("c", (7, 8), 9), ("d", (1, 2, 3, 2), 1)]

    @given(HISTORIES)
    def test_brute_force(self, items):
        histories = Histories([f"u{i}" for i in range(len(items))], [np.array(i, dtype=np.int64) for i in items])
        if max(map(len, items)) < 3:
            with pytest.raises(
                ValueError,
                match=f"leave-two-out needs users with 3 items or more; the longest history has {max(map(len, items))}",
            ):
                leave_two_out(histories)
            return
        split = leave_two_out(histories)
        train, validation, test = {}, [], []
        for user, own in zip(histories.users, items, strict=True):
            own = list(own)
            if len(own) >= 3:
                last = own.pop()
                test.append((user, tuple(own), last))
                last = own.pop()
                validation.append((user, tuple(own), last))
            train[user] = own
        assert by_user(split.train) == train
        assert as_tuples(split.validation) == validation
        assert as_tuples(split.test) == test

    def test_the_histories_stay_as_they_are(self):
        histories = Histories(["a"], [np.arange(5)])
        leave_two_out(histories)
        assert by_user(histories) == {"a": [0, 1, 2, 3, 4]}


@st.composite
def timed(draw):
    """Histories of items that all differ, so that an item tells its time."""
    moments = draw(st.lists(st.lists(st.integers(0, 12), max_size=6).map(sorted), min_size=2, max_size=8))
    first = np.cumsum([0, *map(len, moments)])
    items = [np.arange(start, start + len(own)) for start, own in zip(first, moments, strict=False)]
    times = [np.array(own, dtype=np.float64) for own in moments]
    return Histories([f"u{i}" for i in range(len(moments))], items, times)


def quantile(values, share):
    """Between the two values beside it, in proportion."""
    values = sorted(values)
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


class TestSplitByTime:
    @given(timed(), st.sampled_from([(0.25, 0.5), (0.5, 0.75), (0.25, 0.75), (0.5, 0.9375)]))
    def test_brute_force_and_no_leakage(self, histories, fractions):
        time_of = {
            int(i): float(t)
            for items, times in zip(histories.items, histories.times, strict=True)
            for i, t in zip(items, times, strict=True)
        }
        if not time_of:
            return
        first, second = (quantile(time_of.values(), share) for share in fractions)
        train, validation, test = {}, [], []
        for user, items in zip(histories.users, histories.items, strict=True):
            past = [int(i) for i in items if time_of[int(i)] < first]
            if past:
                train[user] = past
            for part, start, stop in ((validation, first, second), (test, second, np.inf)):
                inside = [int(i) for i in items if start <= time_of[int(i)] < stop]
                before = tuple(int(i) for i in items if time_of[int(i)] < start)
                if inside and before:
                    part.append((user, before, inside[0]))
        if not validation or not test:
            name = "test" if validation else "validation"
            with pytest.raises(ValueError, match=rf"at .* leaves no {name} example; change time_fractions"):
                split_by_time(histories, fractions)
            return
        split = split_by_time(histories, fractions)
        assert by_user(split.train) == train
        assert as_tuples(split.validation) == validation
        assert as_tuples(split.test) == test
        assert all(time_of[i] < first for items in split.train.items for i in items.tolist())
        for part, start, stop in ((split.validation, first, second), (split.test, second, np.inf)):
            for _, history, target in as_tuples(part):
                assert history
                assert max(time_of[i] for i in history) < start <= time_of[target] < stop

    def test_by_hand(self):
        """Eleven interactions at 0 .. 10, so the moments are 5 and 7; what happens at a moment comes after it."""
        items = [np.array(own) for own in ([0, 1, 2, 8], [3, 6, 9], [4, 5, 7], [10])]
        split = split_by_time(Histories(list("abcd"), items, [own.astype(np.float64) for own in items]), (0.5, 0.7))
        assert by_user(split.train) == {"a": [0, 1, 2], "b": [3], "c": [4]}
        assert as_tuples(split.validation) == [("b", (3,), 6), ("c", (4,), 5)]
        assert as_tuples(split.test) == [("a", (0, 1, 2), 8), ("b", (3, 6), 9), ("c", (4, 5), 7)]

    def test_default_fractions(self):
        items = [np.array([*range(0, 80, 2), 85, 95]), np.array([*range(1, 80, 2), 81, 97])]
        times = [i.astype(np.float64) for i in items]
        rest = [np.array([i]) for i in range(80, 100) if i not in (81, 85, 95, 97)]
        whole = Histories([str(i) for i in range(18)], items + rest, times + [i.astype(np.float64) for i in rest])
        split = split_by_time(whole)
        assert [len(i) for i in split.train.items] == [40, 40]  # before 79.2
        assert split.validation.targets.tolist() == [85, 81]
        assert split.test.targets.tolist() == [95, 97]  # from 89.1

    def test_no_times(self):
        with pytest.raises(ValueError, match=r"split = 'time' needs a timestamp column .* split = 'leave-two-out'"):
            split_by_time(Histories(["a"], [np.arange(5)]))

    def test_from_a_file(self, load):
        rows = "u,10,1\nu,11,6\nv,x,2\nv,13,3\nu,x,9\nv,10,8\n"
        split = split_by_time(load(("a.csv", "user_id,item_id,timestamp\n" + rows)), (0.5, 0.7))
        assert by_user(split.train) == {"u": [0], "v": [2, 3]}  # before 4.5
        assert as_tuples(split.validation) == [("u", (0,), 1)]  # before 7
        assert as_tuples(split.test) == [("u", (0, 1), 2), ("v", (2, 3), 0)]


class TestExamples:
    @pytest.fixture
    def examples(self):
        return Examples(list("abcdef"), [np.arange(n) for n in (5, 1, 2, 3, 0, 4)], np.arange(10, 16))

    def test_last(self, examples):
        assert as_tuples(examples.last(2)) == [
            ("a", (3, 4), 10),
            ("b", (0,), 11),
            ("c", (0, 1), 12),
            ("d", (1, 2), 13),
            ("e", (), 14),
            ("f", (2, 3), 15),
        ]
        assert as_tuples(examples.last(100)) == as_tuples(examples)

    def test_sample(self, examples):
        whole = as_tuples(examples)
        for count in (None, 6, 100):
            assert as_tuples(examples.sample(count)) == whole
        for seed in range(5):
            chosen = as_tuples(examples.sample(4, seed))
            assert len(set(chosen)) == 4
            assert [one for one in whole if one in chosen] == chosen  # in their order, each with its own history
            assert as_tuples(examples.sample(4, seed)) == chosen
        assert len({tuple(as_tuples(examples.sample(3, seed))) for seed in range(20)}) > 5
        assert len(examples.sample(0)) == 0


def test_a_null_character_and_a_byte_order_mark(tmp_path, catalogue):
    file = tmp_path / "histories.json"
    file.write_text('\ufeff{"a": ["10", "x"]}', encoding="utf-8")
    assert load_interactions(file, catalogue).users == ["a"]
    file.write_text('{"a\\u0000": ["10", "x"]}', encoding="utf-8")
    with pytest.raises(ValueError, match="has a null character in it; a name was expected"):
        load_interactions(file, catalogue)
