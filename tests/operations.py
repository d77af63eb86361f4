"""The table of docs/operations.md, for the tests of its rows."""

import re
from typing import NamedTuple

from training_runs import ROOT

WAITS = 5.0  # seconds that tests set training.silence and data.patience to


class Row(NamedTuple):
    """Of the page's table."""

    fault: str
    does: str
    within: str
    rank_0: str
    rank_1: str

    def seconds(self) -> float:
        """Within which it ends, under the settings of the test."""
        return sum(WAITS if "." in part else float(part) for part in self.within.split(" + "))

    def says(self, rank: int, said: str) -> bool:
        """Whether what a rank has said holds all that the row has of it; numbers there are examples."""
        for words in re.findall("`(.+?)`", (self.rank_0, self.rank_1)[rank]):
            pattern = r"[\d.]+".join(map(re.escape, re.split(r"[\d.]*\d", words))).replace("…", ".*")
            if not re.search(pattern, said):
                return False
        return True


ROWS = {
    cells[0]: Row(*cells)
    for line in (ROOT / "docs" / "operations.md").read_text().splitlines()
    if line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) == 5
}
