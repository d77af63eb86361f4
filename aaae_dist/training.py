"""The loop: build -> resume -> step, average, log, evaluate, save, stop or go back. Images seen are the only clock."""

import logging
import math
import signal
import time
from contextlib import nullcontext, suppress

import torch

from aaae_dist import checkpoint, distributed, storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.agreement import refuse_drift, seen_by_all
from aaae_dist.augmentation import augment
from aaae_dist.baselines import METHODS
from aaae_dist.compatibility import micro_batch_size, refuse_changes, refuse_other_ranks
from aaae_dist.config import Config
from aaae_dist.data import Batch, sweep, to_float
from aaae_dist.errors import UserError
from aaae_dist.evaluation import evaluate
from aaae_dist.execution import settle_execution
from aaae_dist.inference import overview
from aaae_dist.interval import Interval, slow_data, straggler
from aaae_dist.launched import launched_engine
from aaae_dist.optimizer import Adam
from aaae_dist.preemption import complain_of_grace, job_is_ending, leave_word
from aaae_dist.progress import Progress
from aaae_dist.quarantine import Quarantine
from aaae_dist.randomness import sample_keys
from aaae_dist.reader import Bad, Reader
from aaae_dist.schedule import averaging_rate, learning_rate
from aaae_dist.state import State
from aaae_dist.stopping import StopRequest
from aaae_dist.system import Node
from aaae_dist.tracking import NoTracker, Tracker, is_unfinished, training_of

log = logging.getLogger(__name__)


class Trainer:
    """One training run on this rank."""

    def __init__(self, config: Config, *, stop: StopRequest) -> None:
        """Build everything, and take up the newest checkpoint if there is one.

        Raises:
            UserError: the settings do not fit each other, the data, the ranks, or the run that is there already.
        """
        # What can fail cheaply comes first.
        training, world = config.training, distributed.launched_world()
        self.config, self.run, self.stop = config, training.run, stop
        self.micro = micro_batch_size(config, world)
        refuse_changes(config, self.run)
        data = config.data
        self.readers = [Reader(data, split=data.split, url=url) for url in (data.url, *data.mix)]
        self.held_out = Reader(data, split=data.held_out)
        self.accumulation = training.batch_size // (self.micro * world)

        # The game, and one optimizer with a group for each network.
        torch.manual_seed(training.seed)
        game: GenerativeAutoencoder = METHODS[config.model.method].build(config)
        groups = [
            {"params": weights, "name": name, "betas": getattr(config.optimizer, name).betas}
            for name, network in game.named_children()
            if (weights := list(network.parameters()))
        ]
        self.networks = [group["name"] for group in groups]
        self.optimizer = Adam(groups)
        self.engine = launched_engine()(
            precision=training.precision,
            accumulation=self.accumulation,
            micro=self.micro,
            clip=config.optimizer.clip,
            patience=training.patience,
        )
        refuse_other_ranks(config, self.run)
        settle_execution(game, training, engine=self.engine)
        self.engine.take(game, self.optimizer)
        self.game, self.device = self.engine.game, self.engine.device

        self.state = State(config, self.engine, self.readers)
        self.guard = self.state.guard
        self.judging = 0.0  # seconds that the last evaluation and picture took
        self.judged: tuple[int, dict[str, float]] = (0, {})  # after so many images, the last evaluation

        self.stopping = self.saving_is_due = False
        caches = (reader.fetcher.cache.folder for reader in self.readers if not all(reader.fetcher.local))
        self.node = Node([self.run, *map(str, caches)], device=self.device)
        self.interval = self.begin_interval()
        self.batches = iter(self.state.stream)
        self.quarantine = Quarantine(self.run)
        self.settle()

    def train(self) -> None:
        """Train to the end, or until asked to stop; save either way.

        Raises:
            UserError: the losses are no numbers any more, or the data or the storage failed.
        """
        main, status, config = distributed.rank() == 0, "FAILED", self.config
        beyond = self.state.images - config.training.images
        if beyond >= 0:
            log.info("%s is complete: %s images are trained, nothing is left to do", self.run, f"{self.state.images:,}")
            # Killed between its last checkpoint and its end? A run that went further than asked for is another matter.
            if main and beyond < config.training.batch_size and is_unfinished(self.run):
                lock = storage.Lock(self.run)
                Tracker(self.run, config, images=self.state.images).close("FINISHED")
                lock.release()
            return
        lock = storage.Lock(self.run) if main else None
        if lock is not None and checkpoint.complete(self.run) != self.state.found:
            lock.release()
            raise UserError(f"{self.run}: another training saved there in the meantime; give the same command again")
        if self.state.origin:
            log.info("%s goes on from %s images", self.run, f"{self.state.images:,}")
            if complaint := complain_of_grace(self.state.saver.took):
                log.warning(complaint)
        self.state.forget_later()
        began_at = self.state.images
        self.tracker = Tracker(self.run, self.config, images=self.state.images) if main else NoTracker()
        self.progress = Progress(self.config.training.images, self.state.images, visible=main)
        try:
            seen_by_all(self.run, lambda: training_of(self.run))
            while self.guard.exhausted or not (self.stopping or self.state.images >= config.training.images):
                if self.guard.exhausted:
                    self.go_back()
                self.step(self.next_batch())
                if self.guard.exhausted:
                    continue
                if self.due(config.logging.every):
                    self.log()
                if self.due(config.logging.pictures_every) or self.due(config.evaluation.every):
                    self.judge()
                saving = self.due(config.checkpoint.every) or self.saving_is_due or self.stopping
                if saving or self.due(config.training.compare_every):
                    refuse_drift(self.engine, self.run, images=self.state.images)
                if saving:
                    self.save()
            self.state.finish_saving()
            status = "KILLED" if self.state.images < config.training.images else "FINISHED"
            if status == "KILLED":
                log.info(
                    "%s: stopped as asked, after %s of %s images; the same command again goes on from there",
                    self.run,
                    f"{self.state.images:,}",
                    f"{config.training.images:,}",
                )
            if main:
                leave_word(done=status == "FINISHED", gained=self.state.images > began_at)
        except BaseException as error:
            if not distributed.lost_peer(error):  # of which the other ranks know better, or as little
                self.stop.fail(error)  # they hear of it while this one puts its affairs in order
            if isinstance(error, UserError):
                with suppress(UserError):  # what ended the run is to be told, not what else fails
                    self.quarantine.add(self.met(), alone=True)
            raise
        finally:
            self.batches.close()  # and with it the worker processes
            self.progress.close()
            try:
                with suppress(UserError) if status == "FAILED" else nullcontext():  # nor here
                    self.tracker.close(status)
            finally:
                self.state.saver.close()
                if lock is not None:
                    lock.release()

    def settle(self) -> None:
        """Let the engine see a batch before the first that counts."""
        data = self.config.data
        images = torch.zeros(self.micro, data.channels, data.size, data.size, device=self.device)
        self.engine.settle(images.to(self.game.moments.dtype), sample_keys(0, 0, self.micro, self.device))

    def due(self, every: int) -> bool:
        """Whether an interval of `every` images ended with this step, or the training did."""
        before = self.state.images - self.config.training.batch_size
        return self.state.images >= self.config.training.images or (
            every > 0 and self.state.images // every > before // every
        )

    def next_batch(self) -> Batch:
        """The next batch; the time waited for it is counted."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.interval.add_wait(batch, began=began)
        return batch

    def step(self, batch: Batch) -> None:
        """One optimizer step on one global batch, unless the guard finds it bad."""
        training = self.config.training
        keys = sample_keys(
            self.state.seed, self.state.images + distributed.rank() * len(batch.images), len(batch.images), self.device
        )
        pixels, data = batch.images.to(self.device, non_blocking=True), self.config.data
        if data.crop or data.flip:
            pixels = augment(pixels, keys, size=data.size, flip=data.flip)
        share = learning_rate(training, self.state.images)
        rate = averaging_rate(training, self.state.images + training.batch_size)
        for group in self.optimizer.param_groups:
            group.update(lr=share * getattr(self.config.optimizer, group["name"]).lr, rate=rate)

        moments, turns = torch.zeros_like(self.game.moments[1:]), []
        for part, part_keys in zip(pixels.split(self.micro), keys.split(self.micro), strict=True):
            turn = self.engine.turn(to_float(part).to(moments.dtype), part_keys)
            codes = turn.codes.to(moments.dtype)
            moments += torch.stack([codes.mean(0), codes.square().mean(0)])
            turns.append(turn._replace(loss=turn.loss.detach()))

        # One small all-reduce: the codes' moments, the loss, wishes to stop and to save, a save that failed, the norms.
        loss = torch.stack([turn.loss for turn in turns]).sum()
        means = torch.cat([moments.flatten(), loss.view(1)]).double() / (self.accumulation * distributed.world())
        saver = self.state.saver
        ending = distributed.rank() == 0 and job_is_ending(saver.expected(), judging=self.judging)  # its clock decides
        if ending and not self.stopping:
            log.info("the job ends soon, and saving takes %.0f s: the run stops here", saver.expected())
        wishes = [self.stop.signal is not None or ending, saver.is_due(), saver.problem() != ""]
        told = torch.cat([means, means.new_tensor(wishes), self.engine.squared_norms()])
        told = distributed.sum_over_ranks(told)
        norms = told[-len(self.networks) :].sqrt_()
        # Here, and only here, the host waits for the device.
        loss, stop, due, failed, *lengths = told[moments.numel() :].tolist()
        forward = self.engine.forwards.take()
        self.stopping, self.saving_is_due = self.stopping or stop > 0, self.saving_is_due or due > 0
        if stop:  # for all ranks: the launcher's store may end before them
            self.stop.signal = self.stop.signal or signal.SIGTERM
        if failed:
            self.state.finish_saving()  # which says why

        self.state.images += training.batch_size
        figures = {"the loss": loss} | {
            f"the gradient of {name}": length for name, length in zip(self.networks, lengths, strict=True)
        }
        if complaint := self.guard.judge(figures):
            self.engine.skip()
            log.info("the step to %s images is skipped: %s", f"{self.state.images:,}", complaint)
        else:
            self.state.steps += 1
            self.engine.step(lengths)
            self.game.observe(*told[: moments.numel()].view_as(moments).to(moments), images=training.batch_size)
            self.engine.averaged_moments.lerp_(self.game.moments, rate)
            self.interval.add_step(turns, norms, forward=forward)
        self.progress.advance(self.state.images)

    def begin_interval(self) -> Interval:
        size = self.game.moments.shape[1]
        return Interval(list(self.networks), code_size=size, device=self.device, node=self.node)

    def log(self) -> None:
        """Report the interval that ends here."""
        metrics = self.interval.means(batch_size=self.config.training.batch_size)
        metrics["data/bad_samples"] = self.set_aside()
        metrics |= {"guard/skipped_steps": self.guard.skipped, "guard/rollbacks": len(self.state.rollbacks)}
        metrics["run/restarts"] = self.tracker.restarts
        metrics |= {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self.tracker.log(self.state.images, metrics)
        shown = ("reconstruction/mse", "speed/images_per_second")
        self.progress.say(self.state.images, {name: metrics[name] for name in shown if name in metrics})
        for complaint in filter(None, (slow_data(metrics), straggler(metrics))):
            log.info(complaint)
        self.interval = self.begin_interval()

    def set_aside(self) -> int:
        """List the bad samples that the ranks met in the run's quarantine file; how many there are by now.

        Raises:
            UserError: more than `data.bad_share` allows.
        """
        self.quarantine.add([sample for part in distributed.gather(self.met()) for sample in part])
        for reader in self.readers:
            reader.refuse_too_many(len(self.quarantine.of(reader.fetcher.urls)))
        return len(self.quarantine.samples)

    def met(self) -> list[Bad]:
        """The bad samples that this rank met."""
        return [sample for reader in (*self.readers, self.held_out) for sample in reader.bad.values()]

    def judge(self) -> None:
        """Draw with, and evaluate, the averaged networks, whichever is due."""
        began = time.perf_counter()
        with self.engine.averaged() as networks:
            if self.due(self.config.logging.pictures_every):
                self.draw(networks)
            if self.due(self.config.evaluation.every):
                self.evaluate(networks)
        self.judging = time.perf_counter() - began
        self.interval.began += self.judging  # the interval's images per second are training's

    def draw(self, networks: GenerativeAutoencoder) -> None:
        """A picture of samples of fixed noise and of fixed reconstructions; all ranks draw the same."""
        shown = next(sweep(self.held_out, limit=50, batch_size=min(50, len(self.held_out)))).images
        self.tracker.picture(self.state.images, overview(networks, shown, seed=self.config.training.seed))

    def evaluate(self, networks: GenerativeAutoencoder) -> None:
        """Judge networks, on all ranks."""
        chosen = self.config.evaluation
        metrics = dict(
            evaluate(
                networks,
                train=self.readers[0],
                held_out=self.held_out,
                samples=chosen.samples,
                batch_size=chosen.batch_size,
                workers=self.config.data.workers,
            )
        )
        self.judged = self.state.images, {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.tracker.log(self.state.images, metrics)
        self.progress.say(self.state.images, metrics)

    def save(self) -> None:
        """Save a checkpoint, when the one before is there; the steps go on meanwhile.

        Raises:
            UserError: that one could not be saved; older checkpoints are untouched.
        """
        self.state.finish_saving()
        self.set_aside()
        problem = ""
        if distributed.rank() == 0:
            try:
                self.tracker.flush()  # what the checkpoint counts as done is reported
            except UserError as error:
                problem = str(error)
        if problem := distributed.first(problem):
            raise UserError(f"the checkpoint after {self.state.images:,} images could not be saved: {problem}")
        self.state.save(figures=self.judged[1] if self.judged[0] == self.state.images else {})
        self.saving_is_due = False

    def go_back(self) -> None:
        """Go back to the newest checkpoint that no bad step is near, and on in another order of the data.

        Raises:
            UserError: there is none, or it was done often enough.
        """
        self.batches.close()
        self.state.go_back()
        self.batches, self.interval = iter(self.state.stream), self.begin_interval()
        self.tracker.go_back(self.state.images)
        self.progress.go_back(self.state.images)
