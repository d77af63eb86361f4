"""The verbs about data sets: `prepare` and `shards ...`, their arguments, and their help."""

import os
from typing import Any

from aaae_dist.arguments import SEED, argument, as_setting, group, share, verb, whole

DATA = argument("url", metavar="URL", help="a prepared data set: a folder or any fsspec URL")
THREADS = argument(
    "--workers",
    type=whole(1, 1024),
    default=os.cpu_count() or 1,
    metavar="N",
    help="threads; the result does not depend on it, and each holds one shard in memory; default: one per CPU",
)


def add_preparing(verbs: Any) -> None:
    """Images to shards."""
    verb(
        verbs,
        "prepare",
        "Write images as webdataset shards with an index. The same command again goes on where it was cut short.",
        argument(
            "source",
            metavar="SOURCE",
            choices=("digits", "mnist", "cifar10", "celeba", "flowers102", "folder", "tar"),
            help="digits: scikit-learn's 1,797 digits, without URL; mnist: the official idx files; cifar10: "
            "cifar-10-binary.tar.gz or cifar-10-python.tar.gz; celeba: img_align_celeba.zip, list_attr_celeba.txt and "
            "list_eval_partition.txt; flowers102: 102flowers.tgz, imagelabels.mat and setid.mat; folder: image files "
            "below URL, sub-folders are classes unless --labels is given; tar: webdataset tars below URL, without "
            "--size left where they are and indexed as by `aaae shards index`, with --size written anew",
        ),
        argument(
            "url",
            nargs="?",
            default="",
            metavar="URL",
            help="where the source's files are, official ones as downloaded: a folder or any fsspec URL",
        ),
        argument(
            "--out",
            required=True,
            metavar="OUT",
            help="where to write: a new folder or any fsspec URL; index.json comes last, and before it rejects.csv if "
            "images could not be read",
        ),
        argument(
            "--labels",
            default="",
            metavar="FILE",
            help="for folder: a CSV file with columns file and label, or JSON lines with these keys, that names every "
            "image by its path below URL",
        ),
        argument(
            "--crop",
            type=whole(0, 100_000),
            metavar="N",
            help="cut out the middle square of N pixels before resizing; 0: that of the short side; default: 148 for "
            "celeba (178 is usual too), 0 for the others",
        ),
        argument(
            "--size",
            type=whole(1, 4_096),
            metavar="N",
            help="resize to N x N pixels (antialiased bicubic; smaller grey images are bordered with black instead, up "
            "to twice their size); default: what is usual for the source, 64 for a folder",
        ),
        argument(
            "--channels",
            type=int,
            choices=(1, 3),
            help="1 (grey) or 3 (RGB); default: 1 for digits and mnist, 3 for the others",
        ),
        argument(
            "--format",
            choices=("png", "jpg", "webp"),
            help="of the images stored: png is lossless, jpg the quickest to read; default: png",
        ),
        argument(
            "--quality",
            type=whole(1, 100),
            metavar="N",
            help="of jpg (without chroma subsampling) and webp; default: 95",
        ),
        argument(
            "--held-out",
            type=share,
            metavar="SHARE",
            help="share of the images for the split `test`, where the source has no official one; a hash of seed and "
            "name decides about each, so images that are added later move none; default: 0.1",
        ),
        argument(
            "--samples-per-shard",
            type=whole(1),
            metavar="N",
            help="default: 1000; aim at shards of 50 to 250 MB for an object store",
        ),
        argument("--seed", type=SEED, metavar="N", help="of the shuffle before sharding; default: 0"),
        argument(
            "--bad-share",
            type=share,
            metavar="SHARE",
            help="of the images may be unreadable, and ten always; default: 0.01",
        ),
        THREADS,
        example="aaae prepare folder photos/ --size 64 --format jpg --out s3://bucket/photos",
    )


def add_shards(verbs: Any) -> None:
    """What a data set holds, and what a rank reads of it."""
    read = "aaae shards read store/digits --world 2 --rank 1 --batch-size 64 --count 3"
    inspect = "aaae shards inspect store/digits --picture digits.png"
    verify = "aaae shards verify s3://bucket/photos"
    index = "aaae shards index s3://bucket/tars --out s3://bucket/tars-index"
    shards = group(verbs, "shards", "Prepared data sets.", example="\n  ".join([inspect, verify, index, read]))
    verb(
        shards,
        "shards inspect",
        "Say what a data set holds: images, bytes and sizes by split, images of every class and with every attribute.",
        DATA,
        argument("--json", action="store_true", help="one JSON object on stdout"),
        argument("--picture", metavar="FILE", help="write a picture of 64 random images there, a .png"),
        argument("--seed", type=SEED, default=0, metavar="N", help="of the choice of these images; default: 0"),
        THREADS,
        example=inspect,
    )
    verb(
        shards,
        "shards verify",
        "Read a data set again and say what is damaged, a line each on stdout; exit code 2 if anything is.",
        DATA,
        argument(
            "--quick",
            action="store_true",
            help="compare lengths and checksums alone; without it, every image is decoded too",
        ),
        THREADS,
        example=verify,
    )
    verb(
        shards,
        "shards index",
        "Make a data set of webdataset tars that exist already. They stay where and as they are; all their images must "
        "be squares of one size. Tars whose names, or folders, begin with train, val or test belong to that split.",
        argument("url", metavar="URL", help="the folder, or any fsspec URL, below which the .tar files are"),
        argument(
            "--out", default="", metavar="OUT", help="where to write index.json and the files of offsets; default: URL"
        ),
        argument(
            "--held-out",
            type=share,
            metavar="SHARE",
            help="share of the tars, whole ones, for the split `test`, where no name says it; a hash of its name "
            "decides about each; 0: none; default: 0.1",
        ),
        THREADS,
        example=index,
    )
    verb(
        shards,
        "shards read",
        "Print the keys that a rank reads, one JSON object a batch.",
        DATA,
        argument("--split", default="train", help="default: train"),
        argument("--world", type=whole(1), default=1, metavar="N", help="ranks; default: 1"),
        argument("--rank", type=whole(0), default=0, metavar="N", help="counted from 0; default: 0"),
        argument(
            "--workers",
            type=whole(0, 256),
            default=0,
            metavar="N",
            help="processes that read ahead; the order does not depend on it; default: 0",
        ),
        argument("--batch-size", type=whole(1), required=True, metavar="N", help="of the global batch, over all ranks"),
        argument(
            "--start", type=whole(0), default=0, metavar="P", help="first batch, counted over all epochs; default: 0"
        ),
        argument("--count", type=whole(1), default=10, metavar="C", help="batches; default: 10"),
        argument("--seed", type=SEED, default=0, metavar="N", help="as training.seed; default: 0"),
        as_setting("--lanes", "data.lanes", whole(1, 65_536)),
        as_setting("--window", "data.window", whole(1)),
        example=read,
    )
