"""Files whole or not at all, and one line for whatever goes wrong, on real disks and a real store."""

import base64
import multiprocessing
import os
import subprocess
import threading
import time
import traceback
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import boto3
import pytest
import s3fs
import servers
from conftest import forget_clients, refused, unavailable
from fsspec.implementations.memory import MemoryFileSystem

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.names import files_below

NAMES = ["a", "with space", "ünïcödé 🙂", "100% #1 [x] a+b=c&d?", "x" * 200, "deep/er/file.tar"]
DENIED = "access denied; check the credentials and the permissions of this URL"


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty folder of each kind of store."""
    if request.param == "s3":
        return request.getfixturevalue("s3") + "/some/folder"
    return str(tmp_path / "folder") if request.param == "local" else f"memory://{tmp_path}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_listed_and_removed(place, name):
    url = storage.join(place, name)
    assert not storage.exists(url)
    assert storage.listing(place) == {}
    for data in (b"first", os.urandom(100_000), b""):  # each replaces the one before
        storage.write(url, data)
        assert storage.exists(url)
        assert storage.read(url) == data
        assert storage.listing(url.rpartition("/")[0]) == {url.rpartition("/")[2]: len(data)}
    storage.remove(url)
    storage.remove(url)  # nothing there: nothing happens
    assert not storage.exists(url)


def test_listing_is_of_one_folder_and_removal_of_all_below(place):
    files = {"b.tar": b"22", "a.tar": b"1", "sub/c.tar": b"333", "sub/deep/d": b"4"}
    for name, data in files.items():
        storage.write(storage.join(place, name), data)
    storage.write(place + "-other", b"stays")  # its name only begins like the folder's
    assert list(storage.listing(place + "/")) == ["a.tar", "b.tar", "sub"]
    assert storage.listing(place)["b.tar"] == 2
    assert storage.listing(place + "/b.tar") == {}  # no folder
    assert storage.listing(place + "/sub")["c.tar"] == 3
    storage.remove(place)
    assert storage.listing(place) == {}
    assert not any(storage.exists(storage.join(place, name)) for name in files)
    assert storage.read(place + "-other") == b"stays"


@pytest.mark.parametrize("pattern", ["a*", "a?", "[ab]b", "**"])
def test_removal_takes_no_pattern(place, pattern):
    for name in ("ab", "ac/x", pattern + "/x"):
        storage.write(storage.join(place, name), b"")
    storage.remove(storage.join(place, pattern))
    assert set(storage.listing(place)) == {"ab", "ac"}


def test_json_round_trip_damage_and_absence(place):
    value = {"text": "ünï\n", "list": [1, 2.5, None, True], "deep": {"a": {}}}
    storage.write_json(place + "/x.json", value)
    assert storage.read_json(place + "/x.json") == value
    for data in (b"", b"{", b"\xff\xfe", storage.read(place + "/x.json")[:-9]):
        storage.write(place + "/x.json", data)
        with refused(rf"{place}/x\.json: not JSON \({len(data)} bytes\); it is damaged"):
            storage.read_json(place + "/x.json")
    with refused(f"{place}/none: no such file; check the URL$"):
        storage.read_json(place + "/none")


@pytest.mark.parametrize("failure", [OSError(5, "I/O error"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, failure, call):
    def fail(*_):
        raise failure

    storage.write(str(tmp_path / "file"), b"old")
    monkeypatch.setattr(*((os, call) if call == "fsync" else (Path, call)), fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        storage.write(str(tmp_path / "file"), b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("replace"), replace(self, to)))
    storage.write(str(tmp_path / "file"), b"data")
    assert calls[0].endswith(".partial")
    assert calls[1:] == ["replace", str(tmp_path)]


def test_what_a_kill_leaves_of_a_file_is_swept_away(tmp_path, monkeypatch):
    synced, place = [], str(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    for name in (whole := ["a", "b.c", ".b.partial", "b.0123abcd.partial"]):
        storage.write(storage.join(place, name), b"whole")
    left = [path for path in synced[::2] if path.name.startswith((".a.", ".b.c."))]
    for path in left:
        path.write_bytes(b"a part")
    storage.sweep(place, ["a"])
    assert set(storage.listing(place)) == {*whole, left[1].name}
    storage.sweep(place)
    assert set(storage.listing(place)) == {*whole}
    storage.sweep(storage.join(place, "none"))


def test_readers_and_writers_at_once_see_whole_files(tmp_path):
    url = str(tmp_path / "file")
    storage.write(url, bytes(100_000))
    writers = [
        threading.Thread(target=lambda n=n: [storage.write(url, bytes([n]) * 100_000) for _ in range(20)])
        for n in range(3)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        data = storage.read(url)
        assert len(data) == 100_000
        assert len(set(data)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_and_read_only_disks_are_one_line_and_lose_nothing(full_disk):
    storage.write(f"{full_disk}/old", b"old" * 1000)
    for name in ("old", "new", "folder/new"):
        with refused(f"{full_disk}/{name}: no space left; free some, or choose another place$"):
            storage.write(f"{full_disk}/{name}", os.urandom(100_000))
    assert storage.read(f"{full_disk}/old") == b"old" * 1000
    assert storage.listing(str(full_disk)).keys() == {"folder", "old"}
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    with refused(f"{full_disk}/new: the file system is read-only; choose another place$"):
        storage.write(f"{full_disk}/new", b"new")


def test_an_upload_that_did_not_arrive_whole_is_made_again(tmp_path, monkeypatch):
    original, kept = MemoryFileSystem.pipe_file, [b"som", b"", b"something", b"never"]
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, data: original(self, path, kept.pop(0)))
    storage.write(f"memory://{tmp_path}/file", b"something")
    assert kept == [b"never"]


def test_an_upload_that_never_arrives_whole_is_one_line(tmp_path, monkeypatch):
    original, url = MemoryFileSystem.pipe_file, f"memory://{tmp_path}/file"
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, data: original(self, path, data[:-1]))
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with refused(f"{url}: 8 bytes arrived of 9; check the network and the store"):
        storage.write(url, b"something")


def test_permission_denied_is_one_line(tmp_path):
    url = str(tmp_path / "file")
    storage.write(url, b"old")
    tmp_path.chmod(0o000)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)  # root may do everything, nobody may not
    try:
        for operation in (lambda: storage.read(url), lambda: storage.write(url, b"new")):
            with refused(f"{url}: {DENIED}$"):
                operation()
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    assert storage.read(url) == b"old"


@pytest.mark.parametrize(("url", "words"), [("nosuch://x/y", "Protocol not known: nosuch"), ("gcs://b/x", "gcsfs")])
def test_unknown_protocol_is_one_line(url, words):
    with refused(rf"{url[:3]}\w*://: .*{words}.*; install the package that provides it"):
        storage.read(url)


def test_whatever_else_goes_wrong_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for operation in (lambda: storage.write(f"{tmp_path}/file/x", b""), lambda: storage.read(str(tmp_path))):
        with refused(rf"{tmp_path}.*; check the URL and the store$"):
            operation()


def test_endpoint_and_credentials_may_come_from_a_profile(s3, monkeypatch, tmp_path):
    storage.write(f"{s3}/file", b"something")
    own = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    key, secret, endpoint, region = (os.environ[name] for name in own)
    for name in own:
        monkeypatch.delenv(name)
    credentials, config = tmp_path / "credentials", tmp_path / "config"
    credentials.write_text(f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    config.write_text(f"[profile lab]\nendpoint_url = {endpoint}\nregion = {region}\n")
    for name, value in {"CONFIG_FILE": config, "SHARED_CREDENTIALS_FILE": credentials, "PROFILE": "lab"}.items():
        monkeypatch.setenv(f"AWS_{name}", str(value))
    forget_clients()
    assert storage.read(f"{s3}/file") == b"something"


def test_a_public_bucket_needs_no_credentials(s3, monkeypatch):
    if not servers.ceph_is_installed():
        unavailable("Ceph is not installed, and moto has no public buckets")
    storage.write(f"{s3}/file", b"something")
    client, bucket = boto3.client("s3"), s3.removeprefix("s3://")
    client.put_bucket_acl(Bucket=bucket, ACL="public-read")
    client.put_object_acl(Bucket=bucket, Key="file", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for value, expected in {"": False, "YES": True}.items():
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", value)
        forget_clients()
        if expected:
            assert (storage.read(f"{s3}/file"), storage.listing(s3)) == (b"something", {"file": 9})
        else:
            with refused(f"{s3}/file: no credentials"):
                storage.read(f"{s3}/file")


@pytest.mark.parametrize(
    "url", ["s3://AKIA:hush/hush@bucket/file", "http://me:hush@host/file", "http://:hush@host/a@b"]
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with refused(r"\w+://\*\*\*@(bucket|host)/\S+: a password in a URL") as caught:
        storage.read(url)
    assert "hush" not in str(caught.value)


def test_a_web_server_may_ask_for_a_password(tmp_path, monkeypatch):
    class Closed(servers.RangeHandler):
        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:hush").decode()
            if not known:
                self.send_error(401)
            return known

    (tmp_path / "file").write_bytes(b"something")
    with servers.files(tmp_path, Closed) as url:
        forget_clients()
        with refused(f"{url}/file: {DENIED}$"):
            storage.read(f"{url}/file")
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush\n")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        forget_clients()
        assert storage.read(f"{url}/file") == b"something"


@pytest.mark.parametrize(
    ("status", "again"), [(408, True), (429, True), (500, True), (503, True), (400, False), (403, False), (410, False)]
)
@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_what_a_store_may_recover_from_is_tried_again(tmp_path, monkeypatch, protocol, status, again):
    failures = [status, status]

    class Busy(servers.RangeHandler):
        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            if fails := bool(failures):
                self.send_error(failures.pop())
            return not fails

    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "file").write_bytes(b"something")
    with servers.files(tmp_path, Busy) as url:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        forget_clients()
        place = "s3://bucket/file" if protocol == "s3" else f"{url}/bucket/file"
        if again:
            assert storage.read(place, 0, 9) == b"something"
        else:
            with refused(f"{place}: "):
                storage.read(place, 0, 9)
    forget_clients()
    assert len(failures) == (0 if again else 1)


FAULTS = {
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "hush" * 10}, DENIED),
    "unknown key": ({"AWS_ACCESS_KEY_ID": "AKIAHUSHHUSHHUSHHUSH"}, DENIED),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role; for a public bucket, "
        "AWS_NO_SIGN_REQUEST=true",
    ),
    "closed port": (
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        "the store does not answer; check that it is up and that AWS_ENDPOINT_URL, if set, is right",
    ),
}
OPERATIONS = [storage.read, lambda url: storage.write(url, b"new"), storage.exists, storage.listing, storage.remove]


@pytest.mark.timeout(60)  # the defaults of the clients would try for minutes
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_store_is_one_line_without_credentials(s3, monkeypatch, fault):
    variables, words = FAULTS[fault]
    storage.write(s3 + "/file", b"old")
    with monkeypatch.context() as broken:
        broken.setattr(storage, "PATIENCE", 1.0)
        broken.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in variables.items():
            broken.setenv(name, value) if value else broken.delenv(name)
        forget_clients()
        for operation in OPERATIONS:
            with refused(rf"{s3}/file: {words}( \(\d+ attempts in \d s\))?$") as caught:
                operation(s3 + "/file")
            told = "".join(traceback.format_exception(caught.value))  # with what lies beneath
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                assert os.environ.get(name, "none") not in told
    forget_clients()
    assert storage.read(s3 + "/file") == b"old"


def test_missing_bucket_is_one_line(s3):
    for operation in OPERATIONS[:2]:
        with refused("s3://no-such-bucket/file: the bucket does not exist; create it or correct the URL$"):
            operation("s3://no-such-bucket/file")
    assert not storage.exists("s3://no-such-bucket/file")


def test_what_others_write_is_seen_at_once(s3):
    for number in range(3):
        s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3}/{number}", b"data")
        assert storage.exists(f"{s3}/{number}")
        assert len(storage.listing(s3)) == number + 1


def test_a_forked_process_reads_with_a_client_of_its_own(s3):
    storage.write(s3 + "/file", b"data")
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if storage.read(s3 + "/file") == b"data" else 1)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_web_server_is_not_written_to():
    with refused("https://host/file: a web server is read, not written; choose a folder or an object store$"):
        storage.write("https://host/file", b"")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time begins at 0, and goes on by a hundredth of a second when it is looked at, and by sleeping."""
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now) / 100)
    monkeypatch.setattr(time, "sleep", lambda seconds: [next(now) for _ in range(round(100 * seconds))])


@pytest.mark.usefixtures("clock")
def test_a_store_that_fails_at_once_is_tried_until_the_very_end():
    """A pause and an attempt like the last must fit into what is left; here they take next to nothing."""
    attempts = []

    def fail(*_: object) -> None:
        attempts.append(time.monotonic())
        raise ConnectionResetError

    with refused(r"memory://x: the store does not answer.* \(\d+ attempts in \d+ s\)"):
        storage.persistently("memory://x", fail, patience=20.0)
    assert 17.5 < attempts[-1] - attempts[0] <= 20
    assert len(attempts) >= 10


@pytest.mark.usefixtures("clock")
def test_a_store_that_is_away_is_told_of_once_a_minute_whatever_the_number_of_files(caplog):
    def fail(*_: object) -> None:
        raise ConnectionResetError(f"{next(attempts)}")

    attempts = iter(range(10**6))
    storage.TOLD.clear()
    for number in range(10):  # eight to ten seconds each
        with refused(f"memory://folder/{number}: the store does not answer"):
            storage.persistently(f"memory://folder/{number}", fail, patience=10.0)
    line = "memory://folder: the store does not answer; trying again for up to 10 s"
    assert caplog.messages == [line, line]


@pytest.mark.usefixtures("clock")
def test_a_store_may_be_away_for_hours():
    def fail(*_: object) -> None:
        raise ConnectionResetError

    with refused(r"memory://x: the store does not answer.* \(\d{4} attempts in 7[12]\d\d s\)"):
        storage.persistently("memory://x", fail, patience=7200.0)


class Partial(SimpleHTTPRequestHandler):
    """A server that fails at one folder."""

    def do_GET(self) -> None:
        if "/b" in self.path:
            self.send_error(503)
        else:
            super().do_GET()


def test_a_web_server_that_is_away_is_no_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_bytes(b"")
    with servers.files(tmp_path) as url:
        assert files_below(url) == ["a/b/z", "a/y", "x"]
        assert storage.exists(f"{url}/a/y")
        assert not storage.exists(f"{url}/a/x")
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    with servers.files(tmp_path, Partial) as partial, refused(f"{partial}/a/b/: the store is overloaded"):
        files_below(partial)
    for look in (files_below, storage.exists):
        with refused(f"{url}/a/?: the store does not answer; check that it is up"):
            look(f"{url}/a")
