"""Folders of web servers, as different servers show them."""

import html
import itertools
import re
import shutil
import time
import tracemalloc
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

import pytest
import servers
from conftest import refused

from aaae_dist import storage
from aaae_dist.names import files_below
from aaae_dist.web import entries

NAMES = ["a b/1 2", "a&b/it's", "100%/x+y&z", "a%20b/#1?", "ünï 🙂/~[1]", "A/'quoted\" <i>", "http/https", "a:b", ".c"]
URL = "http://host:80/some%20place/"


class Apache(SimpleHTTPRequestHandler):
    """Pages with links to sort them, to the folder above, to itself and elsewhere, and targets escaped for HTML."""

    def list_directory(self, path):  # type: ignore[override]
        links = [
            "?C=N;O=D",
            "../",
            "./",
            "/",
            "#top",
            "mailto:x@host",
            "http://other/x",
            "//other/y",
            "/icons/back.gif",
        ]
        links += [quote(entry.name, safe="&'") + "/" * entry.is_dir() for entry in Path(path).iterdir()]
        page = "<html><a name=top>".join(f'<A HREF="{html.escape(link)}">{html.escape(link)}</A>' for link in links)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode())


@pytest.mark.parametrize("server", [servers.RangeHandler, Apache])
def test_files_are_named_as_on_a_disk(tmp_path, server):
    for name in NAMES:
        place = tmp_path / "some place" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")
    with servers.files(tmp_path, server) as url:
        for folder in ("some%20place", "some%20place/", "some place//", "x/../some%20place"):
            assert files_below(f"{url}/{folder}") == sorted(NAMES)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("x.tar", "x.tar"),
        ("/some%20place/x", "x"),
        ("/some place/x/", "x/"),
        (f"{URL}x", "x"),
        ("https://host:80/some%20place/x", "x"),
        ("https://other/some%20place/x", ""),
        ("x/y", ""),
        ("../x", ""),
        (".", ""),
        ("x?y", ""),
        ("http://[", ""),
        ("%2e%2e/", ""),
        ("%2e", ""),
        ("...", "..."),
        ("http://HOST/some%20place/x", "x"),
        ('">]]><![foo]><![><<![![foo]><a href="x', "x"),
    ],
)
def test_which_links_lead_to_entries(target, name):
    assert entries(f'<p><a class="x" href="{target}">', URL) == ([name] if name else [])


def test_long_pages_take_no_time_and_wide_folders_no_memory(tmp_path):
    began = time.process_time()
    assert entries("<" * 200_000 + '<a href="x">', URL) == ["x"]
    assert time.process_time() - began < 5
    for number in range(300):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "x").touch()
    with servers.files(tmp_path) as url:
        tracemalloc.start()
        assert len(files_below(url)) == 300
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # a set of 300 names for each of 300 folders: 5 MB
        tracemalloc.stop()


def test_names_of_any_encoding_are_kept_apart():
    assert entries('<a href="%FFa.png"><a href="%FEa.png">', URL) == ["\udcffa.png", "\udcfea.png"]
    assert storage.join("http://host", "\udcffa.png") == "http://host/%FFa.png"


def test_a_folder_of_the_name_of_its_folder_is_no_circle(tmp_path, caplog):
    place = tmp_path / "celeba" / "celeba" / "celeba"
    place.mkdir(parents=True)
    (place / "x.jpg").touch()
    for buckets in itertools.product("012", repeat=3):
        place = tmp_path / "buckets" / "/".join(buckets)
        place.mkdir(parents=True, exist_ok=True)
        (place / "x").touch()
    with servers.files(tmp_path) as url:
        assert len(files_below(f"{url}/buckets")) == 27
        shutil.rmtree(tmp_path / "buckets")
        assert files_below(url) == ["celeba/celeba/celeba/x.jpg"]
        assert caplog.messages == []
        (tmp_path / "dogs").mkdir()
        assert files_below(url) == ["celeba/celeba/celeba/x.jpg"]
        assert caplog.messages == [
            f"{url}/dogs/: nothing is listed there; is it a page that the server makes, at this very address?"
        ]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "one" / "a" / "b").mkdir(parents=True)
    (tmp_path / "one" / "a" / "x").touch()
    (tmp_path / "one" / "a" / "b" / "up").symlink_to("../..")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "alone").symlink_to(".")
    with servers.files(tmp_path) as url:
        for folder in ("one/" + "a/b/up/" * 4 + "a/", "two/" + "alone/" * 21):
            with refused(f"{url}/{folder}: the same names as in a folder above it, as by a link in a circle; remove"):
                files_below(f"{url}/{folder[:3]}")
    for url in ("http://[x/d", "http://\uff48\u2100/d"):
        with refused(re.escape(f"{url}: no web address (")):
            files_below(url)
    for sign in "?#":
        with refused(rf"{url}/a\{sign}b: \? and # mean something else in a web address; write %3F and %23"):
            files_below(f"{url}/a{sign}b")
