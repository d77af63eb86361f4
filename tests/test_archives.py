"""Archives read where they are: what zipfile and tarfile read, under threads, and what damage and malice do."""

import gc
import gzip
import io
import random
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import refused
from official import tgz

from aaae_dist import storage
from aaae_dist.archives import LARGEST, Tgz, Zip
from aaae_dist.errors import UserError

FILES = {f"a/{i:03d}.jpg": random.Random(i).randbytes(50 + 997 * (i % 7)) for i in range(60)} | {"a/zeros": bytes(9000)}


class Pipe(io.BytesIO):
    """What cannot seek, so that a zip's sizes come behind its members."""

    def seekable(self) -> bool:
        return False


def zipped(kind: str) -> bytes:
    """A zip of FILES."""
    file = Pipe() if kind == "from a pipe" else io.BytesIO(b"#!/bin/sh\n" * (kind == "with a stub"))
    file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"a comment"
        archive.mkdir("a")
        for name, data in reversed(FILES.items()):
            with archive.open(name, "w", force_zip64=kind == "64 bits") as member:
                member.write(data)
    return file.getvalue()


GOOD = {"zip": zipped("deflated"), "tgz": tgz(FILES)}
MAKE = {"zip": (Zip, "a zip file"), "tgz": (Tgz, "a gzipped tar")}


@pytest.fixture(params=["local", "s3", "memory"])
def place(request, tmp_path) -> str:
    return {"local": str(tmp_path), "memory": f"memory://{tmp_path}"}.get(request.param) or request.getfixturevalue(
        "s3"
    )


def read_all(archive: Zip | Tgz, names: list[str]) -> list[bytes]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(archive.read, names))


@pytest.mark.parametrize("kind", ["stored", "deflated", "64 bits", "from a pipe", "with a stub"])
def test_every_kind_of_zip(tmp_path, kind):
    (tmp_path / "x.zip").write_bytes(zipped(kind))
    archive = Zip(f"{tmp_path}/x.zip")
    assert {name: archive.read(name) for name in FILES} == FILES
    assert all(name in archive for name in FILES)
    assert "b" not in archive


@pytest.mark.parametrize(("make", "data"), [(Zip, zipped("deflated")), (Tgz, tgz(FILES))], ids=["zip", "tgz"])
def test_threads_read_from_every_store(place, make, data):
    storage.write(f"{place}/x", data)
    names = random.Random(0).choices(list(FILES), k=300)
    assert read_all(make(f"{place}/x"), names) == [FILES[name] for name in names]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_lost_connection_is_tried_again(tmp_path, monkeypatch, kind):
    storage.write(url := f"memory://{tmp_path}/x", GOOD[kind])
    store = storage.locate(url)[0]
    whole, lost = store.cat_file, iter([True, False, True])

    def flaky(*arguments, **options) -> bytes:
        if next(lost, False):
            raise ConnectionResetError("gone")
        return whole(*arguments, **options)

    monkeypatch.setattr(store, "cat_file", flaky)
    assert MAKE[kind][0](url).read("a/003.jpg") == FILES["a/003.jpg"]
    assert len(list(lost)) <= 1  # a small tgz is one read


def test_a_damaged_member_of_a_zip_harms_no_other(tmp_path):
    data = bytearray(zipped("stored"))
    begin = data.index(FILES["a/005.jpg"])
    data[begin + 100] ^= 1
    header = data.rindex(b"PK\3\4", 0, data.index(FILES["a/010.jpg"]))
    data[header] ^= 1
    storage.write(f"{tmp_path}/x.zip", bytes(data))
    archive, unreadable = Zip(f"{tmp_path}/x.zip"), {}
    for name, expected in FILES.items():
        try:
            assert archive.read(name) == expected
        except ValueError as error:
            unreadable[name] = str(error)
    assert unreadable == {
        "a/005.jpg": "damaged in the zip: its size or checksum differs",
        "a/010.jpg": "it is not where the zip's directory says",
    }


def test_members_that_lie_about_their_size(tmp_path):
    """Fields of the directory: method at 10, checksum at 16, packed size at 20, size at 24."""
    data = bytearray(zipped("deflated"))
    lies = {"a/zeros": (24, LARGEST + 1), "a/001.jpg": (24, 10), "a/002.jpg": (20, 7), "a/003.jpg": (16, 0)}
    for name, (at, value) in lies.items():
        entry = data.rindex(b"PK\1\2", 0, data.rindex(name.encode()))
        data[entry + at : entry + at + 4] = struct.pack("<I", value)
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"a/004.jpg"))
    data[entry + 10] = zipfile.ZIP_BZIP2
    storage.write(f"{tmp_path}/x.zip", bytes(data))
    archive = Zip(f"{tmp_path}/x.zip")
    for name, words in {"a/zeros": "bomb: 268435457 bytes", "a/004.jpg": "method 12"}.items():
        with pytest.raises(ValueError, match=words):
            archive.read(name)
    for name in ("a/001.jpg", "a/002.jpg", "a/003.jpg"):
        with pytest.raises(ValueError, match="damaged in the zip"):
            archive.read(name)
    assert archive.read("a/005.jpg") == FILES["a/005.jpg"]


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-12],
    "empty": lambda data: b"",
    "a web page": lambda data: b"<html>404</html>",
    "first bytes only": lambda data: data[:20],
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_archive_is_one_line(tmp_path, kind, damage):
    make, what = MAKE[kind]
    (tmp_path / "x").write_bytes(DAMAGE[damage](GOOD[kind]))
    with refused(rf"{tmp_path}/x: not {what}, or cut short \(.+\); download it again$"):
        make(f"{tmp_path}/x")


@pytest.mark.parametrize("kind", GOOD)
def test_a_missing_archive_is_one_line(place, kind):
    with refused(rf"{place}/x: no such file; check the URL"):
        MAKE[kind][0](f"{place}/x")


def spoiled_zip(chance: random.Random) -> bytes:
    """In its directory, mostly."""
    data = bytearray(GOOD["zip"])
    for _ in range(4):
        data[-1 - int(chance.expovariate(1 / 2000)) % len(data)] = chance.choice([0, 255, 80])
    return bytes(data)


def spoiled_tgz(chance: random.Random) -> bytes:
    """In a header, and then gzipped as if nothing were wrong."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a/000.jpg"))
    data = bytearray(file.getvalue())
    data[chance.randrange(512)] = chance.randrange(256)
    return gzip.compress(data, 1)


@pytest.mark.parametrize(("make", "spoil"), [(Zip, spoiled_zip), (Tgz, spoiled_tgz)], ids=["zip", "tgz"])
def test_no_damage_raises_anything_else(tmp_path, make, spoil):
    chance, refusals = random.Random(0), []
    for number in range(60):
        storage.write(f"{tmp_path}/{number}", spoil(chance))
        try:
            archive = make(f"{tmp_path}/{number}")
            for name in FILES:
                if name in archive:
                    archive.read(name)
        except (UserError, ValueError) as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert not any("\n" in line for line in refusals)


def test_names_in_an_archive_are_never_paths(tmp_path, monkeypatch):
    """Nor are links followed; and the unpacked copy has no name."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in ("../out", str(tmp_path / "absolute"), "in/../../out2"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "x.tgz").write_bytes(file.getvalue())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../out", "abc")
    found = Tgz(f"{tmp_path}/x.tgz"), Zip(f"{tmp_path}/x.zip")
    assert [archive.read("../out") for archive in found] == [b"abc", b"abc"]
    assert "link" not in found[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["place", "x.tgz", "x.zip"]
    with refused(f"{tmp_path}/x.tgz: it holds no link; download it again"):
        found[0].read("link")


def test_a_full_disk_while_unpacking_is_one_line(full_disk: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk))
    (tmp_path / "x.tgz").write_bytes(tgz({"big": bytes(1_000_000)}))
    with refused(rf"{full_disk} \(TMPDIR\), to unpack {tmp_path}/x.tgz: no space left; free some"):
        Tgz(f"{tmp_path}/x.tgz")
    gc.collect()
    (full_disk / "small").write_bytes(bytes(30_000))  # what was unpacked takes no space any more


def test_memory_does_not_grow_with_the_archive(tmp_path):
    """The unpacked copy is on the disk."""
    (tmp_path / "x.tgz").write_bytes(tgz({f"{i}": bytes(8_000_000) for i in range(12)}))
    tracemalloc.start()
    try:
        archive = Tgz(f"{tmp_path}/x.tgz")
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()
    assert archive.read("11") == bytes(8_000_000)
