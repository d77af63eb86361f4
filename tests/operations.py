"""The table of docs/operations.md, for the tests of its rows."""

import re
from typing import NamedTuple

from training_runs import ROOT

WAITS = 5.0  # seconds that tests set training.silence, data.patience and GRACE to
BUSY = 10.0  # seconds that a machine with more ranks than cores may take longer


class Row(NamedTuple):
    """Of the page's table."""

    fault: str
    does: str
    within: str
    rank_0: str
    rank_1: str

    def seconds(self) -> float:
        """Within which it ends, under the settings of the test, on a machine that has more to do."""
        return BUSY + sum(float(part) if part.isdigit() else WAITS for part in self.within.split(" + "))

    def says(self, rank: int, said: str) -> bool:
        """Whether what a rank has said holds all that the row has of it; numbers there are examples."""
        for words in re.findall("`(.+?)`", (self.rank_0, self.rank_1)[rank]):
            pattern = r"[\d.]+".join(map(re.escape, re.split(r"[\d.]*\d", words))).replace("…", ".*")
            if not re.search(pattern, said):
                return False
        return True


def table() -> dict[str, Row]:
    """The rows by their faults, of which each must be there once."""
    page = (ROOT / "docs" / "operations.md").read_text()
    lines = page.partition("| fault |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines]
    found = {row.fault: row for row in rows}
    assert len(found) == len(rows)
    return found


ROWS = table()
