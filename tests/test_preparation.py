"""Preparing: what stock webdataset reads from the shards, the same bytes every time, and no data set by halves."""

import csv
import io
import json
import multiprocessing
import re
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import preparing
import pytest
from conftest import contents, examples, noise, prepared, refused, stock_samples
from PIL import Image, features

from aaae_dist import sources, storage
from aaae_dist.errors import UserError
from aaae_dist.images import fit
from aaae_dist.indexing import index
from aaae_dist.preparation import REJECTS, UNFINISHED, Recipe, hold_out, middle
from aaae_dist.shards import INDEX, read_index
from aaae_dist.tars import load_offsets, read_sample

RNG = np.random.default_rng(0)


def everything(out: str | Path) -> dict[str, dict]:
    """What stock webdataset reads from all splits, by key."""
    splits = {shard.split for shard in read_index(str(out)).shards}
    return {key: sample for split in splits for key, sample in stock_samples(str(out), split).items()}


# --- what is written


def test_stock_webdataset_reads_every_digit_once(digits):
    source, found = sources.SOURCES["digits"]("", labels=""), everything(digits)
    assert len(found) == len(source.keys)
    for example in examples(source):
        assert found[example.key]["cls"] == example.label
        assert np.array_equal(found[example.key]["png"][:, :, 0], example.pixels)
    keys = list(stock_samples(digits, "train"))  # shuffled before they are cut into shards
    assert abs(np.corrcoef([int(key) for key in keys], np.arange(len(keys)))[0, 1]) < 0.1
    assert keys[:3] == ["001153", "001439", "000652"]  # the order never changes


@pytest.mark.parametrize(("form", "quality"), [("png", 95), ("jpg", 95), ("jpg", 50), ("webp", 95), ("webp", 50)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [True, False])
def test_stock_webdataset_reads_pixels_and_labels(tmp_path, form, quality, channels, labels):
    assert features.check("webp")
    source = noise(11, labels=labels)
    prepared(source, tmp_path / "out", format=form, quality=quality, channels=channels)
    found = everything(tmp_path / "out")
    assert len(found) == 11
    for i, example in enumerate(examples(source)):
        expected = Image.fromarray(example.pixels).convert("RGB" if channels == 3 else "L")
        options = {"png": {}, "jpg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}}[form]
        expected.save(tmp_path / f"x.{form}", **options)
        sample = found[f"{i:03d}"]
        assert np.array_equal(sample[form], np.asarray(Image.open(tmp_path / f"x.{form}").convert("RGB")))
        assert sample.get("cls") == (i % 5 if labels else None)
        assert {name for name in sample if not name.startswith("_")} == {form} | ({"cls"} if labels else set())


def test_attributes_are_a_list_in_every_sample(tmp_path):
    marks = RNG.integers(0, 2, (12, 40), dtype=np.uint8)
    names = [f"attribute {i}" for i in range(40)]
    index = prepared(noise(12, labels=False)._replace(attributes=names, marks=marks), tmp_path)
    assert index.attributes == names
    assert {
        key: sample[".json"] if ".json" in sample else sample["attributes.json"]
        for key, sample in everything(tmp_path).items()
    } == {f"{i:03d}": marks[i].tolist() for i in range(12)}


def test_offsets_lead_to_every_sample(tmp_path):
    index = prepared(noise(23), tmp_path)
    for shard in index.shards:
        data = (tmp_path / shard.url).read_bytes()
        offsets = load_offsets((tmp_path / shard.offsets).read_bytes(), samples=shard.samples)
        samples = [read_sample(data[slice(*offsets.span(i))]) for i in range(shard.samples)]
        stock = stock_samples(str(tmp_path), shard.split)
        for key, members in samples:
            assert int(members["cls"]) == stock[key]["cls"]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["png"])).convert("RGB")), stock[key]["png"])


def test_names_of_all_kinds_survive_the_tar(tmp_path):
    names = ["a/x.png", "a/x.jpg", "a/v1.0 final.png", "ü 🙂 #%20[x]?/y.png", f"{'d' * 200}/{'x' * 200}.png", "b/z.png"]
    for shade, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (70, 64), shade).save(tmp_path / "in" / name)
    source = sources.SOURCES["folder"](str(tmp_path / "in"), labels="")
    prepared(source, tmp_path / "out", held_out=1)
    found = everything(tmp_path / "out")
    assert found.keys() == set(source.keys)
    for example in examples(source):
        assert found[example.key].get("cls") == example.label
        assert (found[example.key]["png"] == example.pixels[0, 0]).all()


def test_the_same_input_gives_the_same_bytes_everywhere(tmp_path, s3):
    places = [str(tmp_path / "a"), str(tmp_path / "b"), f"memory://{tmp_path}", f"{s3}/deep/er"]
    for workers, place in enumerate(places, 1):
        prepared(noise(23, unreadable=[7]), place, workers=workers)
    first, *others = (contents(place) for place in places)
    assert len(first) == 2 * (5 + 1) + 2
    assert all(other == first for other in others)
    prepared(noise(23), f"{s3}/seed", seed=1)
    assert contents(f"{s3}/seed") != first


@pytest.mark.parametrize("count", [2, 5, 9, 12])
@pytest.mark.parametrize("samples_per_shard", [1, 4, 1000])
def test_shards_are_full_but_the_last_of_a_split(tmp_path, count, samples_per_shard):
    index = prepared(noise(count), tmp_path, held_out=1, samples_per_shard=samples_per_shard)
    counts = [shard.samples for shard in index.shards if shard.split == "train"]
    assert sum(counts) == count - 1
    assert all(n == samples_per_shard for n in counts[:-1])
    assert [(shard.url, shard.samples) for shard in index.shards if shard.split == "test"] == [("test-000000.tar", 1)]


# --- splits


def test_official_splits_are_kept(tmp_path):
    splits = ["test" if i in (1, 5, 6) else "val" if i == 0 else "train" for i in range(12)]
    index = prepared(noise(12)._replace(splits=splits), tmp_path)
    assert [(shard.url, shard.samples) for shard in index.shards] == [
        ("train-000000.tar", 4),
        ("train-000001.tar", 4),
        ("val-000000.tar", 1),
        ("test-000000.tar", 3),
    ]
    assert stock_samples(str(tmp_path), "test").keys() == {"001", "005", "006"}
    assert stock_samples(str(tmp_path), "val").keys() == {"000"}
    with refused("--held-out 0.1: test has an official split; leave it out$"):
        prepared(noise(12)._replace(splits=splits), tmp_path / "new", held_out=0.1)
    assert not (tmp_path / "new").exists()


def test_images_added_later_move_no_others():
    keys = [f"folder/{i}" for i in range(4000)]
    before = dict(zip(keys, hold_out(keys, share=0.1, seed=0, what="images"), strict=True))
    assert abs(Counter(before.values())["test"] - 400) < 4 * np.sqrt(400 * 0.9)  # four standard deviations
    rng = np.random.default_rng(0)
    for _ in range(5):
        more = [str(key) for key in rng.permutation([*keys, *(f"new/{i}" for i in rng.integers(0, 10**9, 1000))])]
        after = dict(zip(more, hold_out(more, share=0.1, seed=0, what="images"), strict=True))
        assert {key: after[key] for key in keys} == before
    other = hold_out(keys, share=0.1, seed=1, what="images")
    assert 20 < sum(a == b == "test" for a, b in zip(other, before.values(), strict=True)) < 70  # 40 by chance
    larger = hold_out(keys, share=0.2, seed=0, what="images")
    assert all(b == "test" for a, b in zip(before.values(), larger, strict=True) if a == "test")


def test_a_share_that_leaves_a_split_empty_names_one_that_does_not(tmp_path):
    with refused(
        r"--held-out 0.0001: it holds out none of the 9 images, which their names decide; the least"
    ) as caught:
        prepared(noise(9), tmp_path, held_out=0.0001)
    least = float(re.search(r"that does is (\S+), and 0 holds out none$", str(caught.value))[1])
    with refused("--held-out 0.99999: it leaves none of the 9 images to train on; lower it$"):
        prepared(noise(9), tmp_path, held_out=0.99999)
    assert list(tmp_path.iterdir()) == []
    index = prepared(noise(9), tmp_path / "least", held_out=least)
    assert sum(shard.samples for shard in index.shards if shard.split == "test") == 1
    index = prepared(noise(9), tmp_path / "none", held_out=0.0)
    assert {shard.split for shard in index.shards} == {"train"}


# --- images that cannot be read


def test_unreadable_images_are_listed_and_left_out(tmp_path, caplog):
    unreadable = [0, 3, 5, 7, 8, 11, 13, 16, 19, 22]
    index = prepared(noise(23, unreadable=unreadable), tmp_path)
    assert sorted(everything(tmp_path)) == [f"{i:03d}" for i in range(23) if i not in unreadable]
    assert sum(shard.samples for shard in index.shards) == 13
    with (tmp_path / REJECTS).open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["key", "reason"],
            *([f"{i:03d}", f"number {i} is broken"] for i in unreadable),
        ]
    assert caplog.messages == [f"10 images could not be read and are left out: {tmp_path}/{REJECTS}"]
    prepared(noise(23), tmp_path / "good")
    assert REJECTS not in contents(tmp_path / "good")


@pytest.mark.parametrize(
    ("count", "bad", "share", "many"),
    [
        (40, 10, 0.0, False),
        (40, 11, 0.0, True),
        (40, 11, 0.25, True),
        (40, 11, 0.275, False),
        (1200, 12, 0.01, False),
        (1200, 13, 0.01, True),
    ],
)
def test_too_many_unreadable_images_publish_nothing(tmp_path, count, bad, share, many):
    source = noise(count, unreadable=range(4, 4 + bad))
    if not many:
        prepared(source, tmp_path, bad_share=share, samples_per_shard=300)
        return
    with refused(f"{bad} of {count} images cannot be read, more than --bad-share {share:g} allows; the first is 0"):
        prepared(source, tmp_path, bad_share=share, samples_per_shard=2000)
    assert not (tmp_path / INDEX).exists()
    prepared(source, tmp_path, bad_share=0.9, samples_per_shard=2000)  # goes on: the share decides about no byte
    assert sum(shard.samples for shard in read_index(str(tmp_path)).shards) == count - bad


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (noise(5, unreadable=range(5)), r"test: no image of split train can be read \(00\d: number \d is broken\); ch"),
        (
            noise(6, unreadable=[0, 3])._replace(splits=["train"] * 3 + ["val"] + ["test"] * 2),
            r"test: no image of split val can be read \(003: number 3 is broken\); ch",
        ),
        (noise(0), "test: no images; check the files$"),
    ],
)
def test_nothing_to_prepare_is_one_line(tmp_path, source, line):
    with refused(line):
        prepared(source, tmp_path)
    assert INDEX not in storage.listing(str(tmp_path))


def test_a_web_server_is_refused_before_it_is_asked(tmp_path):
    for make in (
        lambda out: prepared(noise(9), out),
        lambda out: index(str(tmp_path), out=out, held_out=0.0, workers=1),
    ):
        with refused("https://host/out: a web server is read, not written; choose a folder or an object store$"):
            make("https://host/out")


# --- what is there already


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_place_that_holds_a_data_set_is_refused_and_untouched(tmp_path, request, kind):
    out = {"local": str(tmp_path), "memory": f"memory://{tmp_path}"}.get(kind) or request.getfixturevalue("s3")
    prepared(noise(9), out)
    before = contents(out)
    for change in ({"seed": 1}, {"held_out": 2}, {"format": "jpg"}):
        with refused(
            f"{out}/: it already holds a data set, of other images or made with other options; choose another"
        ):
            prepared(noise(9), out + "/", **change)
    assert contents(out) == before


@pytest.mark.parametrize("harm", ["missing", "flipped", "without offsets"])
def test_what_was_damaged_is_made_anew_by_the_same_command(tmp_path, harm):
    """As every line about damage says."""
    made = prepared(noise(9), str(tmp_path))
    before = contents(str(tmp_path))
    tar, offsets = tmp_path / "train-000000.tar", tmp_path / "train-000000.offsets"
    if harm == "flipped":
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    else:
        (tar if harm == "missing" else offsets).unlink()
    assert contents(str(tmp_path)) != before
    assert prepared(noise(9), str(tmp_path)) == made
    assert contents(str(tmp_path)) == before


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    made = prepared(noise(9), str(tmp_path))
    before = contents(str(tmp_path))
    monkeypatch.setattr(storage, "write", None)
    assert prepared(noise(9), str(tmp_path)) == made
    assert contents(str(tmp_path)) == before


@pytest.mark.parametrize("name", ["train-000001.tar", "test-000000.offsets", REJECTS])
def test_files_of_others_are_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with refused(f"{tmp_path}/{name}: another file is there already; remove it, or choose another --out$"):
        prepared(noise(9, unreadable=[0]), tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine"
    assert not (tmp_path / INDEX).exists()


def fails_at(source: sources.Source, number: int) -> sources.Source:
    def read(i: int) -> np.ndarray:
        if i == number:
            raise UserError("the store fails")
        return source.read(i)

    return source._replace(read=read)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"quality": 50}, {"crop": 4}, {"format": "webp"}, {"origin": "other"}, {"held_out": 2}]
)
def test_unfinished_work_of_other_options_is_refused_and_untouched(tmp_path, changes):
    with refused("the store fails"):
        prepared(fails_at(noise(23), 22), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(UNFINISHED in str(path) for path in before)
    with refused(
        f"{tmp_path}/{UNFINISHED}.*: left by an unfinished preparation of other images or with other options;"
    ):
        prepared(noise(23), tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": [f"{i:03d}" for i in range(1, 24)]},
        {"labels": [4 - i % 5 for i in range(23)]},
        {"classes": list("abcde")},
        {"marks": np.ones((23, 2), np.uint8)},
        {"attributes": ["Bald", "Male"]},
        {},
    ],
    ids=lambda changes: next(iter(changes), "PIL"),
)
def test_unfinished_work_of_other_images_or_another_pil_is_refused(tmp_path, monkeypatch, changes):
    source = noise(23)._replace(marks=np.zeros((23, 2), np.uint8), attributes=["Male", "Bald"])
    with refused("the store fails"):
        prepared(fails_at(source, 22), tmp_path)
    if not changes:
        monkeypatch.setattr(PIL, "__version__", "1.0")
    with refused(f"{tmp_path}/{UNFINISHED}.*: left by an unfinished preparation of other images or with other options"):
        prepared(source._replace(**changes), tmp_path)


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_failure_in_the_middle_publishes_nothing_and_is_gone_on_from(tmp_path, request, kind):
    out = {"local": str(tmp_path), "memory": f"memory://{tmp_path}"}.get(kind) or request.getfixturevalue("s3")
    source = noise(23, unreadable=[4])
    with refused("the store fails"):
        prepared(fails_at(source, 22), out, workers=1)
    (unfinished,) = (name for name in storage.listing(out) if name.startswith(UNFINISHED))
    records = [storage.read_json(f"{out}/{unfinished}/{name}") for name in storage.listing(f"{out}/{unfinished}")]
    assert INDEX not in storage.listing(out)
    finished = {key for record in records for key, _ in record["rejects"]}
    for record in records:
        data = storage.read(f"{out}/{record['shard']['url']}")
        offsets = load_offsets(storage.read(f"{out}/{record['shard']['offsets']}"), samples=record["shard"]["samples"])
        finished |= {read_sample(data[slice(*offsets.span(i))])[0] for i in range(record["shard"]["samples"])}
    assert finished

    read: list[str] = []
    note = source._replace(read=lambda i: (read.append(f"{i:03d}"), source.read(i))[1])
    prepared(note, out)
    assert sorted(read) == sorted(set(source.keys) - finished)  # each once, and none that was done
    prepared(source, f"memory://{tmp_path}-whole")
    assert contents(out) == contents(f"memory://{tmp_path}-whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "offsets", "record"])
def test_a_shard_is_trusted_only_if_it_is_what_its_record_says(tmp_path, damage):
    with refused("the store fails"):
        prepared(fails_at(noise(23), 22), tmp_path, workers=1)
    (record, *_) = sorted(tmp_path.glob(f"{UNFINISHED}*/*.json"))
    tar, offsets = (tmp_path / json.loads(record.read_text())["shard"][name] for name in ("url", "offsets"))
    data = tar.read_bytes()
    if damage == "cut":
        tar.write_bytes(data[:-512])
    elif damage == "flipped":
        tar.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    elif damage == "gone":
        tar.unlink()
    elif damage == "offsets":
        offsets.unlink()
    else:
        record.write_bytes(b"{")
    if damage in ("cut", "flipped"):
        with refused(f"{tar}: another file is there already; remove it, or choose another --out$"):
            prepared(noise(23), tmp_path)
        tar.unlink()
    prepared(noise(23), tmp_path)
    prepared(noise(23), tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def test_full_disk_is_one_line_and_loses_nothing(full_disk):
    storage.write(f"{full_disk}/mine", b"mine" * 1000)
    with refused(rf"{full_disk}/.*train-\d+\.(tar|offsets|json): no space left; free some, or choose another place$"):
        prepared(noise(200), full_disk)
    files = [path for path in full_disk.rglob("*") if path.is_file()]
    assert (full_disk / "mine").read_bytes() == b"mine" * 1000
    assert {path.suffix for path in files} <= {"", ".tar", ".offsets", ".json"}  # no litter
    assert not (full_disk / INDEX).exists()


# --- killed


FORKS = multiprocessing.get_context("forkserver")  # real processes, but of one that has imported everything
FORKS.set_forkserver_preload(["aaae_dist.preparation"])


def killed(out: Path, count: int, log: Path, *, write: int = -1, hold: int = -1, after: float = 0) -> bool:
    """Whether a preparation ended by SIGKILL: at a write, or some seconds after a thread was held at an image."""
    process = FORKS.Process(target=preparing.be_killed, args=(str(out), count, log, write, hold))
    before = lines(log)
    process.start()
    if hold >= 0:
        while lines(log) - before <= hold:
            assert process.is_alive()
        process.join(after)
        process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def recorded(out: Path) -> set[str]:
    return {path.stem for path in out.glob(f"{UNFINISHED}*/*.json")}


def images_by_shard(out: Path) -> dict[str, set[int]]:
    """The numbers of the images of every shard, by its name."""
    rows = {}
    for shard in read_index(str(out)).shards:
        data, table = (out / shard.url).read_bytes(), (out / shard.offsets).read_bytes()
        offsets = load_offsets(table, samples=shard.samples)
        rows[Path(shard.url).stem] = {int(read_sample(data[slice(*offsets.span(i))])[0]) for i in range(shard.samples)}
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_the_work_goes_on_to_the_same_bytes(tmp_path, seed):
    rng, out, whole, log = np.random.default_rng(seed), tmp_path / "out", tmp_path / "whole", tmp_path / "log"
    preparing.work(str(whole), 60)
    images, spared, kills = images_by_shard(whole), 0, 0
    while not (out / INDEX).exists():
        done, before = recorded(out), lines(log)
        left = sum(len(numbers) for name, numbers in images.items() if name not in done)
        if kills < 6 and left > 10:
            kills += killed(out, 60, log, hold=int(rng.integers(left // 2)), after=float(rng.uniform(0, 0.03)))
        else:
            assert not killed(out, 60, log)
        read = {int(line) for line in log.read_text().splitlines()[before:]}
        for name in done & images.keys():
            assert not read & images[name], f"{name} was packed again"
        spared += len(done)
    assert kills >= 2
    assert spared
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("count", [14])
def test_killed_at_any_write_the_work_goes_on_to_the_same_bytes(tmp_path, count):
    preparing.work(str(tmp_path / "whole"), count)
    whole = contents(tmp_path / "whole")
    writes = 3 * len(read_index(str(tmp_path / "whole")).shards) + 3  # and the rejects, the index, no more records
    for write in range(2 * writes - 1):  # after the last, all is done
        out = tmp_path / str(write)
        assert killed(out, count, tmp_path / "log", write=write)
        assert not killed(out, count, tmp_path / "log")
        assert contents(out) == whole  # nor is there litter
    assert not killed(tmp_path / "last", count, tmp_path / "log", write=2 * writes)


# --- the rule of size


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (40, 30), (30, 41), (5, 3), (1, 300), (300, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_short_side_is_resized_and_the_middle_cut_out(height, width, channels):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    expected = image.resize((8, 8), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    assert np.array_equal(fit(pixels, channels=channels, size=8), np.asarray(expected))


@pytest.mark.parametrize(
    ("height", "width", "crop", "box"),
    [
        (218, 178, 148, (15, 35, 163, 183)),  # CelebA: as torchvision's CenterCrop(148)
        (218, 178, 178, (0, 20, 178, 198)),
        (218, 178, 200, (0, 20, 178, 198)),
        (30, 41, 8, (16, 11, 24, 19)),
    ],
)
@pytest.mark.parametrize("size", [8, 64])
def test_the_middle_square_is_cut_out_before(height, width, crop, box, size):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    recipe = Recipe(3, crop=crop, size=size, format="png", quality=0)
    expected = Image.fromarray(pixels).crop(box).resize((size, size), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(recipe.apply(pixels)))), np.asarray(expected))
    assert middle(pixels, 0) is pixels


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 32), (27, 27, 32), (20, 24, 32), (16, 16, 32)])
def test_small_grey_images_are_bordered_with_black(height, width, size):
    pixels = RNG.integers(1, 256, (height, width), dtype=np.uint8)
    bordered = fit(pixels, channels=1, size=size)
    top, left = (size - height) // 2, (size - width) // 2
    assert bordered.shape == (size, size)
    assert np.array_equal(bordered[top : top + height, left : left + width], pixels)
    assert np.count_nonzero(bordered) == pixels.size
    assert np.count_nonzero(fit(pixels, channels=3, size=size)) > 3 * 0.95 * size**2  # colour is resized
    assert np.count_nonzero(fit(pixels[:15], channels=1, size=size)) > 0.95 * size**2  # so is what is too small
