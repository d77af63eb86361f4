"""Where a training stands, and how that is saved, taken up, and taken back."""

import hashlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence

from aaae_dist import checkpoint, distributed, storage
from aaae_dist.agreement import refuse_other_state, seen_by_all
from aaae_dist.config import Config
from aaae_dist.data import Stream
from aaae_dist.engine import Engine
from aaae_dist.errors import UserError
from aaae_dist.guard import ROLLBACKS, Guard, diverged, read_rollbacks, write_rollbacks
from aaae_dist.randomness import another
from aaae_dist.reader import Reader
from aaae_dist.saving import Saver

log = logging.getLogger(__name__)


class State:
    """All that makes a training go on where it was, on this rank."""

    def __init__(self, config: Config, engine: Engine, readers: Sequence[Reader]) -> None:
        """Take up the newest checkpoint of the run, if there is one.

        Raises:
            UserError: its data set is another one, or the ranks do not see the same checkpoints.
        """
        self.config, self.run, self.engine, self.readers = config, config.training.run, engine, readers
        self.images = self.steps = 0  # seen, and taken: a step that is skipped sees images too
        self.guard = Guard(config.guard)
        self.found = seen_by_all(self.run, lambda: checkpoint.complete(self.run))
        self.origin = ""  # which of these it goes on from
        # Whoever removed all checkpoints begins anew.
        self.rollbacks = distributed.from_rank_0(lambda: read_rollbacks(self.run) if self.found else [])
        self.stream = self.open_stream()
        self.saver = Saver(self.run, config.checkpoint, rank=distributed.rank(), attempt=self.new_attempt())
        self.resume(self.found)
        self.saver.reserve(self.engine.to_save())

    @property
    def seed(self) -> int:
        """Of the order of the data and every draw: each time that the run goes back, another."""
        return another(self.config.training.seed, len(self.rollbacks))

    def new_attempt(self) -> str:
        """A word that all ranks share, and that no other attempt at the same steps has."""
        return distributed.from_rank_0(lambda: secrets.token_hex(8))

    def open_stream(self) -> Stream:
        """This rank's part of every batch."""
        training, data = self.config.training, self.config.data
        return Stream(
            self.readers,
            weights=(1.0, *data.mix.values()),
            seed=self.seed,
            lanes=data.lanes,
            window=data.window,
            batch_size=training.batch_size,
            world=distributed.world(),
            rank=distributed.rank(),
            workers=data.workers,
        )

    def save(self, *, figures: Mapping[str, float]) -> None:
        """Begin to save a checkpoint, if all weights are finite; the one before must be finished.

        Args:
            figures: of an evaluation at this moment, if there was one.
        """
        pieces = self.engine.to_save()
        lost = (tensor for tensor, piece in pieces.items() if not piece.values["weight"].isfinite().all())
        if bad := distributed.first(next(lost, "")):
            self.guard.condemn(f"{bad} is not finite")
            return
        self.saver.begin(checkpoint.name_of(self.images), pieces, self.manifest(figures))

    def manifest(self, figures: Mapping[str, float]) -> checkpoint.Manifest:
        """What a checkpoint says of this moment."""
        return checkpoint.Manifest(
            engine=self.engine.name,
            world=distributed.world(),
            config=hashlib.sha256(self.config.toml().encode()).hexdigest(),
            shapes=self.engine.shapes,
            sound=self.guard.sound,
            figures=dict(figures),
            progress={
                "images": self.images,
                "steps": self.steps,
                "stream": self.stream.state_dict(),
                "guard": self.guard.state_dict(),
            },
            fingerprints={},
            files={},
        )

    def finish_saving(self) -> None:
        """Wait for the checkpoint under way, if there is one; every rank learns whether it went well.

        Raises:
            UserError: the storage failed; older checkpoints are untouched.
        """
        there = False
        while not there:  # no collective takes longer than this, however long the store does
            told = distributed.gather((self.saver.wait(seconds=1.0), self.saver.problem()))
            if problem := next((problem for _, problem in told if problem), ""):
                self.saver.given_up.set()
                raise UserError(problem)
            there = all(done for done, _ in told)

    def resume(self, names: Sequence[str]) -> None:
        """Take up the newest undamaged one of these checkpoints, if there is one.

        Raises:
            UserError: its data set is another one.
        """
        restored = checkpoint.restore(self.run, names, self.engine.pieces(), agree=distributed.first)
        if restored is None:
            return
        self.origin, manifest = restored
        progress = manifest.progress
        stream = progress["stream"]
        try:
            self.stream.load_state_dict(stream | {"order": stream["order"] | {"seed": self.seed}})
        except UserError as error:
            raise UserError(f"{error}, or choose another training.run than {self.run}") from None
        self.images, self.steps = progress["images"], progress["steps"]
        self.guard.load_state_dict(progress["guard"])
        if stream["order"]["seed"] != self.seed:  # it goes back, or has just done so: with a new budget of bad steps
            self.guard.forgive()
        self.saver.took = manifest.seconds
        self.engine.adam.count(self.steps)
        self.engine.refresh()
        refuse_other_state(self.engine, manifest)

    def go_back(self) -> None:
        """Go back to the newest checkpoint that no bad step is near, and on in another order of the data.

        Raises:
            UserError: there is none, or it was done often enough.
        """
        self.finish_saving()
        complaint, limit = self.guard.complaint, self.config.guard.rollbacks
        names = distributed.from_rank_0(self.good)
        if not names or len(self.rollbacks) >= limit:
            often = f", and it went back guard.rollbacks = {limit} times," if names else ""
            raise diverged(self.run, f"{complaint}{often}", images=self.images)
        event = {"after": self.images, "to": 0, "because": complaint, "time": 0.0}
        self.rollbacks.append(event)
        self.stream = self.open_stream()
        self.resume(names)
        event |= {"to": self.images, "time": round(time.time(), 3)}
        log.info(
            "%s goes back from %s to %s images: %s", self.run, f"{event['after']:,}", f"{self.images:,}", complaint
        )
        self.saver.attempt = self.new_attempt()  # else parts that the former attempt left would be taken for its own
        # In this order: killed between the two, the run comes to the same point again, and goes back again.
        self.forget_later()
        if distributed.rank() == 0:
            write_rollbacks(self.run, self.rollbacks)

    def good(self) -> list[str]:
        """Sound checkpoints, the best last: of the newest `keep`, the newest that it has not gone back to before."""
        names, tried = checkpoint.complete(self.run), set[int]()
        for back in self.rollbacks:  # what came after was unmade, and is another if it is there
            tried = {to for to in tried if to < back["to"]} | {back["to"]}
        recent = names[-self.config.checkpoint.keep :]
        found = checkpoint.sound(self.run, names)
        return sorted(found, key=lambda name: (name in recent, int(name) not in tried, name))

    def forget_later(self) -> None:
        """Set aside the checkpoints after the one that it goes on from: they will be saved anew."""
        if distributed.rank() == 0 and self.origin:
            checkpoint.set_aside_after(self.run, self.origin)
        elif distributed.rank() == 0:
            storage.remove(storage.join(self.run, ROLLBACKS))
