"""Folders of web servers: pages of links, as Apache, nginx and Python's own server write them."""

import logging
import re
from contextlib import suppress
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

from aaae_dist import storage
from aaae_dist.errors import UserError, one_line

log = logging.getLogger(__name__)

ALIKE, ALIKE_ALONE = 3, 20  # folders below each other that list the same (one folder alone) before it is a circle


class Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.feed(re.sub(r"(?<!<)<+(?=!\[)", "", page))  # what begins so it takes for SGML, and fails at

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [target for name, target in attrs if name == "href" and target]


def entries(page: str, url: str) -> list[str]:
    """Names of what the page of a folder says is right below it, as on a disk; those of folders end with a slash.

    Args:
        url: of the folder, with a slash at its end.
    """
    found, server, here = {}, urlsplit(url).hostname, storage.unquoted(urlsplit(url).path)
    for target in Links(page).targets:
        with suppress(ValueError):  # no address
            place = urlsplit(urljoin(url, target))
            path = storage.unquoted(place.path)
            name = path.removeprefix(here)
            # Other links sort the page, or lead up or elsewhere.
            if (
                place.hostname == server
                and path.startswith(here)
                and re.fullmatch(r"(?!\.\.?/?$)[^/]+/?", name)
                and not place.query
            ):
                found[name] = None
    return list(found)


def files_below(url: str) -> list[str]:
    """Names of all files below a folder, from there on and as on a disk.

    fsspec's own `find` takes a server that does not answer for an empty folder, and some names for other servers.

    Raises:
        UserError: a folder cannot be read, or leads back to one above it.
    """
    if "?" in url or "#" in url:
        raise UserError(f"{url}: ? and # mean something else in a web address; write %3F and %23 where they are names")
    try:
        root = urljoin(storage.join(url, ""), ".")  # without dots in it
    except ValueError as error:
        raise UserError(f"{url}: no web address ({one_line(error)}); correct it") from None
    found: list[str] = []
    waiting: list[tuple[str, tuple[set[str], ...]]] = [("", ())]
    while waiting:
        folder, above = waiting.pop()
        place = root + storage.quoted(folder)
        names = entries(storage.read(place).decode(errors="replace"), place)
        inner, here = [name for name in names if name.endswith("/")], set(names)
        if not names:
            log.warning("%s: nothing is listed there; is it a page that the server makes, at this very address?", place)
        if inner and above.count(here) > (ALIKE if len(names) > 1 else ALIKE_ALONE):
            raise UserError(f"{place}: the same names as in a folder above it, as by a link in a circle; remove that")
        found += [folder + name for name in names if not name.endswith("/")]
        waiting += [(folder + name, (*above, here)) for name in inner]
    return found
