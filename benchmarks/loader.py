"""What does it cost to read a batch? Ours beside the JPEG decoder alone, webdataset, mosaicml-streaming and litdata.

    python benchmarks/loader.py [--peers FOLDER] [--quick]

Measured is CPU time per sample, of the reading process and its workers together, so that other work on the machine
changes little; every figure is of a process of its own. The data, cut out of two photographs and encoded as `aaae
prepare` does with photographs (JPEG, quality 95, colours in full resolution), are made in a temporary folder (3 GB);
each loader finds the same images in its own format.

First table: local files, an epoch in mid-stream, the middle one of five rounds, in each of which all loaders have
their turn; in brackets the decode limit's time over the loader's, of the same round, again the middle one. Second: 2
workers and an S3 store behind a proxy that delays every request: seconds from the loader's construction, all packages
imported, to its first batch, with an empty cache; CPU of all until the end of the first epoch, workers' start and
download included; and of an epoch after that.

webdataset knows no s3://. It is given what its users give it, `pipe:aws s3 cp URL -`; and, as the least that is
possible, URLs that were signed beforehand, which no long training can use, as they expire.

The store is Ceph where it is installed, else moto's server, which is slow. The packages of the tests are needed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset as wds
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, default_collate

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.data import Stream
from aaae_dist.distributed import keep_freed_memory
from aaae_dist.indexing import index
from aaae_dist.preparation import Recipe
from aaae_dist.reader import Reader

HERE = Path(__file__).parent
BATCH = 128
ROUNDS = 5
LONGEST = 4.0  # seconds for an epoch that is measured; slow loaders do not finish it
PEERS = {  # without their dependencies: those that reading needs are in our environment, torch among them
    "mosaic": ["mosaicml-streaming==0.13.0", "catalogue", "Brotli", "python-snappy", "cramjam", "xxhash", "zstd"],
    "litdata": ["litdata==0.2.76", "tifffile"],
}
AWS = "awscli==1.44.87"


class Job(NamedTuple):
    """What a process is to read, and after how many samples measuring begins."""

    loader: str
    url: str  # below it: tars, mosaic, litdata
    tars: list[str]
    size: int
    workers: int
    cache: str
    warm_up: int
    epoch: int


# --- the loaders, each an endless iterator of the numbers of samples in its batches


def decode_limit(job: Job) -> Iterator[int]:
    """simplejpeg in a loop, over all images in memory in random order."""
    data = [sample["jpg"] for sample in wds.WebDataset(job.tars, shardshuffle=False)]
    while True:
        random.shuffle(data)
        for start in range(0, len(data), BATCH):
            part = data[start : start + BATCH]
            for image in part:
                simplejpeg.decode_jpeg(image, "RGB")
            yield len(part)


def ours(job: Job) -> Iterator[int]:
    reader = Reader(Data(url=f"{job.url}/tars", channels=3, size=job.size, cache=job.cache), split="train")
    stream = Stream([reader], seed=0, lanes=16, window=65_536, batch_size=BATCH, workers=job.workers)
    yield from (len(batch.images) for batch in stream)


def webdataset_recipe(job: Job) -> Iterator[int]:
    """The README's pipeline."""
    dataset = wds.WebDataset(job.tars, shardshuffle=100).shuffle(1000).decode("torchrgb").to_tuple("jpg", "cls")
    yield from for_ever(wds.WebLoader(dataset.batched(BATCH), batch_size=None, **options(job)))


def webdataset_uint8(job: Job) -> Iterator[int]:
    """The same with the faster decoder, and without a conversion to floats."""
    dataset = wds.WebDataset(job.tars, shardshuffle=100).shuffle(1000).map(decoded).batched(BATCH, default_collate)
    yield from for_ever(wds.WebLoader(dataset, batch_size=None, **options(job)))


def mosaic(job: Job) -> Iterator[int]:
    url = f"{job.url}/mosaic"
    place = {"local": url} if storage.is_local(url) else {"remote": url, "local": job.cache}
    dataset = mosaic_package().StreamingDataset(**place, shuffle=True, batch_size=BATCH)
    yield from for_ever(DataLoader(dataset, BATCH, collate_fn=collate, **options(job)))


def litdata(job: Job) -> Iterator[int]:
    package = import_module("litdata")
    dataset = package.StreamingDataset(f"{job.url}/litdata", job.cache, shuffle=True, transform=decoded)
    yield from for_ever(package.StreamingDataLoader(dataset, batch_size=BATCH, **options(job)))


def options(job: Job) -> dict[str, Any]:
    return {"num_workers": job.workers, "persistent_workers": job.workers > 0}


def for_ever(loader: Any) -> Iterator[int]:
    while True:
        yield from (len(images) for images, _ in loader)


def decoded(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    return torch.from_numpy(simplejpeg.decode_jpeg(sample["jpg"], "RGB")), int(sample["cls"])


def collate(samples: list[dict[str, Any]]) -> Any:
    return default_collate([decoded(sample) for sample in samples])


LOADERS: dict[str, Callable[[Job], Iterator[int]]] = {
    "decode limit": decode_limit,
    "ours": ours,
    "webdataset, README": webdataset_recipe,
    "webdataset, simplejpeg": webdataset_uint8,
    "mosaic": mosaic,
    "litdata": litdata,
}


def mosaic_package() -> Any:
    """mosaicml-streaming without its parts that import torchvision or transformers; reading needs neither."""
    unused = ["streaming.multimodal", "streaming.text", "streaming.vision", "transformers"]
    unused += ["transformers.feature_extraction_utils", "transformers.tokenization_utils_base"]
    sys.modules.update(dict.fromkeys(unused, SimpleNamespace(BatchFeature=dict, BatchEncoding=dict)))  # pyrefly: ignore
    import_module("streaming.base.util").clean_stale_shared_memory()  # of an earlier process: it would wait for that
    return import_module("streaming")


IMPORTED: dict[str, Callable[[], Any]] = {  # before the clock starts
    "ours": lambda: import_module("s3fs"),
    "mosaic": mosaic_package,
    "litdata": lambda: import_module("litdata"),
}


# --- measuring, in a process of its own


def measure(*job: Any) -> dict[str, float]:
    """Seconds to the first batch; CPU in microseconds per sample to the end of the warm-up, then of an epoch; memory in
    MB before and after that.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    task = Job(*job)
    IMPORTED.get(task.loader, lambda: None)()
    used, began = cpu(), time.perf_counter()
    batches = LOADERS[task.loader](task)
    seen = next(batches)
    first = time.perf_counter() - began

    def cost(samples: int, seconds: float) -> float:
        """Read so many samples, but for no longer than that; CPU since it was looked at last."""
        nonlocal used, seen
        end = time.perf_counter() + seconds
        while seen < samples and time.perf_counter() < end:
            seen += next(batches)
        spent, seen, used = (cpu() - used) / seen * 1e6, 0, cpu()
        return spent

    cold, before = cost(task.warm_up, 60), memory()
    used = cpu()
    warm = cost(task.epoch, LONGEST)
    return {"first": first, "cold": cold, "warm": warm, "before": before, "after": memory()}


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu() -> float:
    """Seconds of CPU that this process and all below it have used, those that ended included."""
    spent = 0.0
    for process in family():
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[:4])
    return spent


def memory() -> float:
    """Memory of this process and all below it, each page counted once, in MB."""
    return sum(process.memory_full_info().pss for process in family()) / 1e6


# --- the data, and what reads them


def make(folder: Path, *, size: int, count: int) -> None:
    """Images of this size in eight webdataset tars, with an index beside them."""
    folder.mkdir(parents=True)
    recipe = Recipe(channels=3, crop=0, size=size, format="jpg", quality=95)
    chosen, photographs = np.random.default_rng(0), load_sample_images().images
    for shard in range(8):
        with wds.TarWriter(str(folder / f"train-{shard}.tar"), encoder=False, mtime=0) as tar:
            for number in range(shard * count // 8, (shard + 1) * count // 8):
                photograph = photographs[number % 2]
                top, left = chosen.integers([side - size for side in photograph.shape[:2]])
                jpg = recipe.apply(photograph[top : top + size, left : left + size])
                tar.write({"__key__": f"{number:06d}", "jpg": jpg, "cls": str(number % 10).encode()})
    index(str(folder), out=str(folder), held_out=None, workers=1)


def convert(peer: str, tars: list[str], out: str) -> None:
    """The same images in a peer's own format, in files of 16 MB."""
    samples = ({"jpg": s["jpg"], "cls": int(s["cls"])} for s in wds.WebDataset(tars, shardshuffle=False))
    if peer == "mosaic":
        columns = {"jpg": "bytes", "cls": "int"}
        with mosaic_package().MDSWriter(out=out, columns=columns, size_limit=1 << 24) as writer:
            for sample in samples:
                writer.write(sample)
    else:
        writer = import_module("litdata.streaming.writer").BinaryWriter(out, chunk_bytes=1 << 24)
        for number, sample in enumerate(samples):
            writer[number] = sample
        writer.done()
        writer.merge()


def environment(folder: Path, packages: Sequence[str]) -> str:
    """The Python of an environment with these packages, and ours behind them; it is made if it is not there."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        behind = f"import site; site.addsitedir({str(Path(np.__file__).parents[1])!r})\n"
        next(folder.glob("lib/python*/site-packages")).joinpath("ours.pth").write_text(behind)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-c", HERE.parent / "constraints.txt", *packages]
    subprocess.run(install, check=False)  # the import will fail, which the tables tell
    return str(python)


def tool(folder: Path) -> str:
    """The aws command, in an environment of its own, which is made if it is not there."""
    command = folder.absolute() / "bin" / "aws"
    if not command.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder.absolute() / "bin" / "pip", "install", "--quiet", AWS], check=True)
    return str(command)


class Bench(NamedTuple):
    """What is compared, on which data."""

    home: Path
    counts: dict[int, int]  # of the images of an epoch, by their size
    pythons: dict[str, str]  # of the peers
    aws: str  # the command; empty: there is none
    failures: dict[str, str]  # of loaders: why there are no figures

    def loaders(self, *without: str) -> list[str]:
        return [name for name in LOADERS if name not in without and (name not in PEERS or name in self.pythons)]

    def apart(self, loader: str, function: str, *arguments: Any) -> Any:
        """What a function of this file returns in a new process; nothing if that fails three times, or did so before.

        Of mosaic's processes with two workers and a store, about half read a shard that is still being written.
        """
        line = f"import json, sys, loader; print(json.dumps(loader.{function}(*json.loads(sys.argv[1]))))"
        command = [self.pythons.get(loader, sys.executable), "-c", line, json.dumps(arguments)]
        settings = os.environ | {"OMP_NUM_THREADS": "1"}
        for attempt in range(1, 4):
            if loader in self.failures:
                break
            done = subprocess.run(command, cwd=HERE, env=settings, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return json.loads(done.stdout.splitlines()[-1])
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            print(f"{loader} failed: {reason}", file=sys.stderr)
            if attempt == 3:
                self.failures[loader] = reason
        return None

    def tars(self, size: int) -> list[str]:
        return sorted(map(str, self.home.glob(f"{size}/tars/*.tar")))

    def prepare(self) -> None:
        """Make the data."""
        for size, count in self.counts.items():
            make(self.home / str(size) / "tars", size=size, count=count)
            for peer in self.pythons:
                self.apart(peer, "convert", peer, self.tars(size), str(self.home / str(size) / peer))

    def figures(self, loader: str, url: str, tars: list[str], size: int, workers: int, warm_up: float) -> Any:
        """What `measure` finds, with an empty cache; the warm-up is in epochs."""
        print(f"{url}: {size} px, {workers} workers, {loader}", file=sys.stderr)
        with TemporaryDirectory() as cache:
            epoch = self.counts[size]
            job = Job(loader, f"{url}/{size}", tars, size, workers, cache, int(warm_up * epoch), epoch)
            return self.apart(loader, "measure", *job)

    def local(self, workers: Sequence[int], rounds: int) -> None:
        """The table of local files."""
        cases = [(size, count) for size in self.counts for count in workers]
        found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}  # costs, and the decode limit's over them
        for size, count in cases * rounds:
            limit = 0.0
            for loader in self.loaders():
                if told := self.figures(loader, str(self.home), self.tars(size), size, count, warm_up=0.25):
                    limit = told["warm"] if loader == "decode limit" else limit
                    found.setdefault((loader, size, count), []).append((told["warm"], limit / told["warm"]))

        def cell(loader: str, size: int, count: int) -> str:
            if loader in self.failures:
                return "failed"
            costs, shares = zip(*found[loader, size, count], strict=True)
            return f"{median(costs):.1f} ({median(shares):.2f})"

        head = ["CPU µs per sample", *(f"{size} px, {count} workers" for size, count in cases)]
        table(head, [[loader, *(cell(loader, *case) for case in cases)] for loader in self.loaders()])

    def recipes(self) -> Iterator[tuple[str, str, Callable[[Any, str], str]]]:
        """What reads from a store: the loader, its name there, and how it is told of a tar."""
        for loader in self.loaders("decode limit", "webdataset, README", "webdataset, simplejpeg"):
            yield loader, loader, lambda _, path: f"s3://{path}"
        yield "webdataset, simplejpeg", "webdataset, signed URLs", lambda store, path: store.url(path, expires=9_999)
        if self.aws:
            yield (
                "webdataset, simplejpeg",
                "webdataset, aws s3 cp",
                lambda _, path: f"pipe:{self.aws} s3 cp s3://{path} -",
            )

    def remote(self, latencies: Sequence[float]) -> None:
        """The table of an S3 store, and a line of ours' memory."""
        sys.path.append(str(HERE.parent / "tests"))
        servers, faults = import_module("servers"), import_module("faults")
        rows, said = [], []
        with ExitStack() as stack:
            kind = "Ceph" if servers.ceph_is_installed() else "moto"
            server = stack.enter_context(servers.ceph() if kind == "Ceph" else servers.moto())
            variables = server.variables if kind == "Ceph" else server
            proxy = stack.enter_context(faults.FaultProxy(variables["AWS_ENDPOINT_URL"]))
            os.environ.update(variables | {"AWS_ENDPOINT_URL": proxy.url, "S3_ENDPOINT_URL": proxy.url})  # mosaic's
            store: Any = storage.locate("s3://bench")[0]
            store.mkdir("bench")
            for path in filter(Path.is_file, self.home.rglob("*")):
                storage.write(f"s3://bench/{path.relative_to(self.home)}", path.read_bytes())
            for latency in latencies:
                proxy.faults = faults.Faults(latency=latency)
                for loader, name, tar in self.recipes():
                    cells = []
                    for size in self.counts:
                        tars = [tar(store, f"bench/{size}/tars/train-{number}.tar") for number in range(8)]
                        told = self.figures(loader, "s3://bench", tars, size, 2, warm_up=1)
                        cells += [f"{told[part]:.4g}" for part in ("first", "cold", "warm")] if told else ["failed"] * 3
                        if loader == "ours":
                            said.append(f"{size} px {told['before']:.0f} and {told['after']:.0f}")
                    rows.append([f"{name}, {latency * 1000:.0f} ms", *cells])
        columns = ("first batch, s", "first epoch, µs", "a later one, µs")
        table([kind, *(f"{size} px: {column}" for size in self.counts for column in columns)], rows)
        print(f"Memory of ours before and after two epochs, MB: {'; '.join(said)}.")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="for environments of mosaic and litdata, kept")
    parser.add_argument("--quick", action="store_true", help="little data, few cases: a minute, rough figures")
    arguments = parser.parse_args()
    if arguments.peers and arguments.peers.is_file():
        sys.exit(f"--peers {arguments.peers}: a file; name a folder")
    counts = {64: 8_000} if arguments.quick else {64: 40_000, 256: 20_000}
    with TemporaryDirectory() as home:
        peers = PEERS if arguments.peers else {}
        pythons = {peer: environment(arguments.peers / peer, packages) for peer, packages in peers.items()}
        aws = tool(arguments.peers / "aws") if arguments.peers else ""
        bench = Bench(Path(home), counts, pythons, aws, {})
        bench.prepare()
        bench.local([2] if arguments.quick else [0, 1, 2], rounds=1 if arguments.quick else ROUNDS)
        bench.remote([0.02] if arguments.quick else [0.0, 0.02])
        for loader, reason in bench.failures.items():
            print(f"{loader} failed: {reason}")


if __name__ == "__main__":
    main()
