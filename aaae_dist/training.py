"""The loop: build -> resume -> step, average, log, evaluate, save, stop. Images seen are the only clock."""

import logging
import math
import time
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from aaae_dist import checkpoint, distributed, storage
from aaae_dist.aaae import GenerativeAutoencoder, Turn
from aaae_dist.augmentation import augment
from aaae_dist.baselines import METHODS
from aaae_dist.compatibility import micro_batch_size, refuse_changes
from aaae_dist.config import Config
from aaae_dist.data import Batch, Stream, sweep, to_float
from aaae_dist.errors import UserError
from aaae_dist.evaluation import evaluate
from aaae_dist.inference import overview
from aaae_dist.interval import Interval
from aaae_dist.progress import Progress
from aaae_dist.quarantine import Quarantine
from aaae_dist.randomness import sample_keys
from aaae_dist.reader import Bad, Reader
from aaae_dist.schedule import averaging_rate, learning_rate
from aaae_dist.stopping import StopRequest
from aaae_dist.tracking import NoTracker, Tracker, is_unfinished

log = logging.getLogger(__name__)

# Some gradients of a paired critic are zero but for rounding, such as that of a bias behind which all samples are on
# the same side. With the usual 1e-8 Adam would make full steps of that noise, and two ranks would drift from one
# process by 2 % in 20 steps; with this they agree to 3e-6, and digits come out no worse.
ADAM_EPSILON = 1e-5


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
        self.accelerator = distributed.start(
            precision=training.precision, accumulation=self.accumulation, patience=training.patience
        )
        self.device = self.accelerator.device

        # The game, the averages behind it, and one optimizer with a group for each network.
        torch.manual_seed(training.seed)
        self.game: GenerativeAutoencoder = METHODS[config.model.method].build(config).to(self.device)
        self.average = self.game.average()
        self.networks = {
            name: list(network.parameters())
            for name, network in self.game.named_children()
            if any(True for _ in network.parameters())
        }
        groups = [
            {"params": weights, "name": name, "lr": 0.0, "betas": getattr(config.optimizer, name).betas}
            for name, weights in self.networks.items()
        ]
        self.optimizer = torch.optim.Adam(groups, foreach=True, eps=ADAM_EPSILON)

        self.images, self.stream = 0, self.open_stream()
        self.found, self.saved = checkpoint.complete(self.run), ""  # what is there, and what it goes on from
        self.resume()
        self.model, self.optimizer = self.accelerator.prepare(self.game, self.optimizer)
        distributed.keep_buffers_local(self.model)

        # What ranks agree on at every step: whether to stop, and whether the loss or a network's gradient is no number.
        self.agreed = distributed.HostCopy(torch.zeros(2 + len(self.networks)))
        self.stopping = False
        self.interval = self.begin_interval()
        self.batches = iter(self.stream)
        self.quarantine = Quarantine(self.run)
        self.settle()

    def train(self) -> None:
        """Train to the end, or until asked to stop; save either way.

        Raises:
            UserError: the losses are no numbers any more, or the data or the storage failed.
        """
        main, status, config = distributed.rank() == 0, "FAILED", self.config
        beyond = self.images - config.training.images
        if beyond >= 0:
            log.info("%s is complete: %s images are trained, nothing is left to do", self.run, f"{self.images:,}")
            # Killed between its last checkpoint and its end? A run that went further than asked for is another matter.
            if main and beyond < config.training.batch_size and is_unfinished(self.run):
                lock = storage.Lock(self.run)
                Tracker(self.run, config, images=self.images).close("FINISHED")
                lock.release()
            return
        lock = storage.Lock(self.run) if main else None
        if lock is not None and checkpoint.complete(self.run) != self.found:
            lock.release()
            raise UserError(f"{self.run}: another training saved there in the meantime; give the same command again")
        if main and self.saved:
            checkpoint.discard_after(self.run, self.saved)
        self.tracker = Tracker(self.run, self.config, images=self.images) if main else NoTracker()
        self.progress = Progress(self.config.training.images, self.images, visible=main)
        try:
            while self.images < config.training.images and not self.stopping:
                self.step(self.next_batch())
                if self.due(config.logging.every):
                    self.log()
                if self.due(config.logging.pictures_every):
                    self.draw()
                if self.due(config.evaluation.every):
                    self.evaluate()
                if self.due(config.checkpoint.every) or self.stopping:
                    self.save()
            status = "KILLED" if self.images < config.training.images else "FINISHED"
            if status == "KILLED":
                log.info(
                    "%s: stopped as asked, after %s of %s images; the same command again goes on from there",
                    self.run,
                    f"{self.images:,}",
                    f"{config.training.images:,}",
                )
        except UserError:
            with suppress(UserError):  # what ended the run is to be told, not what else fails
                self.quarantine.add(self.met(), alone=True)
            raise
        finally:
            self.batches.close()  # and with it the worker processes
            self.progress.close()
            self.tracker.close(status)
            if lock is not None:
                lock.release()

    def settle(self) -> None:
        """One backward for nothing: after its first, DDP puts gradients into other buckets for good.

        More than two ranks sum in an order that depends on the bucket, so without this a run that was resumed would
        differ, in the last bits, from one that was not.
        """
        if distributed.world() == 1:
            return
        data = self.config.data
        images = torch.zeros(self.micro, data.channels, data.size, data.size, device=self.device)
        turn = self.model(images.to(self.game.moments.dtype), sample_keys(0, 0, self.micro, self.device))
        self.accelerator.backward(turn.loss)
        self.optimizer.zero_grad()

    def due(self, every: int) -> bool:
        """Whether an interval of `every` images ended with this step, or the training did."""
        before = self.images - self.config.training.batch_size
        return self.images >= self.config.training.images or (every > 0 and self.images // every > before // every)

    def open_stream(self) -> Stream:
        """This rank's part of every batch."""
        training, data = self.config.training, self.config.data
        return Stream(
            self.readers,
            weights=(1.0, *data.mix.values()),
            seed=training.seed,
            lanes=data.lanes,
            window=data.window,
            batch_size=training.batch_size,
            world=distributed.world(),
            rank=distributed.rank(),
            workers=data.workers,
        )

    def next_batch(self) -> Batch:
        """The next batch; the time waited for it is counted."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.interval.add_wait(batch, began=began)
        return batch

    def step(self, batch: Batch) -> None:
        """One optimizer step on one global batch."""
        training = self.config.training
        keys = sample_keys(
            training.seed, self.images + distributed.rank() * len(batch.images), len(batch.images), self.device
        )
        pixels, data = batch.images.to(self.device, non_blocking=True), self.config.data
        if data.crop or data.flip:
            pixels = augment(pixels, keys, size=data.size, flip=data.flip)
        share = learning_rate(training, self.images)
        for group in self.optimizer.param_groups:
            group["lr"] = share * getattr(self.config.optimizer, group["name"]).lr

        moments, loss = torch.zeros_like(self.game.moments[1:]), torch.zeros((), device=self.device)
        for part, part_keys in zip(pixels.split(self.micro), keys.split(self.micro), strict=True):
            with self.accelerator.accumulate(self.model):
                turn: Turn = self.model(to_float(part).to(moments.dtype), part_keys)
                self.accelerator.backward(turn.loss)
            codes = turn.codes.to(moments.dtype)
            moments += torch.stack([codes.mean(0), codes.square().mean(0)]) / self.accumulation
            loss += turn.loss.detach() / self.accumulation
            self.interval.add_forward(turn)
        norms = self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

        # One small all-reduce: the codes' moments, a wish to stop, and numbers that are none.
        bad = ~torch.stack([loss.to(norms.dtype), *norms]).isfinite()
        told = distributed.sum_over_ranks(
            torch.cat(
                [
                    moments.flatten() / distributed.world(),
                    bad.new_tensor([self.stop.signal is not None]).to(moments.dtype),
                    bad.to(moments.dtype),
                ]
            )
        )
        self.game.observe(*told[: moments.numel()].view_as(moments), images=training.batch_size)
        before, self.agreed = self.agreed, distributed.HostCopy(told[moments.numel() :])

        self.images += training.batch_size
        self.average.follow(self.game, rate=averaging_rate(training, self.images))
        self.interval.add_step(norms)
        self.progress.advance(self.images)
        self.heed(before)  # of the step before this one, so that the host never waits for a device at work

    def clip(self) -> Float[Tensor, " network"]:
        """The gradient norm of every network; if `optimizer.clip` is set, each is scaled down to it by itself."""
        limit, norms = self.config.optimizer.clip, []
        for weights in self.networks.values():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients))
            if limit:
                torch._foreach_mul_(gradients, (limit / (norms[-1] + 1e-6)).clamp(max=1.0))
        return torch.stack(norms)

    def heed(self, agreed: distributed.HostCopy) -> None:
        """Act on what the ranks agreed on at a step.

        Raises:
            UserError: the loss or a gradient is not a number. The weights are lost, the checkpoints are not.
        """
        stop, *bad = agreed.tolist()
        self.stopping = self.stopping or stop > 0
        if any(bad):
            what = ["the loss", *(f"the gradient of {name}" for name in self.networks)]
            raise self.bad_numbers(what[[value > 0 for value in bad].index(True)])

    def bad_numbers(self, what: str) -> UserError:
        return UserError(
            f"{self.run}: {what} is not finite after {self.images:,} images, so training stopped; older checkpoints "
            "are untouched: begin another training.run with lower learning rates or other penalties"
        )

    def begin_interval(self) -> Interval:
        return Interval(list(self.networks), code_size=self.game.moments.shape[1], device=self.device)

    def log(self) -> None:
        """Report the interval that ends here."""
        self.heed(self.agreed)
        metrics = self.interval.means(batch_size=self.config.training.batch_size)
        metrics["data/bad_samples"] = self.set_aside()
        metrics |= {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self.tracker.log(self.images, metrics)
        shown = ("reconstruction/mse", "speed/images_per_second")
        self.progress.say(self.images, {name: metrics[name] for name in shown})
        if complaint := slow_data(metrics):
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

    def draw(self) -> None:
        """A picture of samples of fixed noise and of fixed reconstructions. No collectives: rank 0 draws."""
        self.heed(self.agreed)
        if distributed.rank() == 0:
            shown = next(sweep(self.held_out, limit=50, batch_size=min(50, len(self.held_out)))).images
            self.tracker.picture(self.images, overview(self.average, shown, seed=self.config.training.seed))

    def evaluate(self) -> None:
        """Judge the averaged networks, on all ranks."""
        self.heed(self.agreed)
        began = time.perf_counter()
        chosen = self.config.evaluation
        metrics = dict(
            evaluate(
                self.average,
                train=self.readers[0],
                held_out=self.held_out,
                samples=chosen.samples,
                batch_size=chosen.batch_size,
                workers=self.config.data.workers,
            )
        )
        if bad := [name for name, value in metrics.items() if math.isnan(value)]:
            raise self.bad_numbers(bad[0])
        self.tracker.log(self.images, metrics)
        self.progress.say(self.images, metrics)
        self.interval.began += time.perf_counter() - began  # the interval's images per second are training's

    def save(self) -> None:
        """Save a checkpoint, on rank 0; every rank learns whether that went well.

        Raises:
            UserError: the storage failed; older checkpoints are untouched.
        """
        self.heed(self.agreed)
        self.set_aside()
        for name, value in self.game.state_dict().items():
            if not value.isfinite().all():
                raise self.bad_numbers(name)
        problem = ""
        if distributed.rank() == 0:
            slots = self.optimizer.state
            moments = {
                f"{name}.{slot}": value
                for name, weight in self.game.named_parameters()
                for slot, value in slots[weight].items()
            }
            tensors = {"game": self.game.state_dict(), "average": self.average.state_dict(), "optimizer": moments}
            progress = {"images": self.images, "stream": self.stream.state_dict()}
            try:
                self.tracker.flush()  # what the checkpoint counts as done is reported
                checkpoint.save(
                    self.run, self.images, tensors=tensors, progress=progress, keep=self.config.checkpoint.keep
                )
            except UserError as error:
                problem = str(error)
        if problem := distributed.from_rank_0(problem):
            raise UserError(f"the checkpoint after {self.images:,} images could not be saved: {problem}")

    def resume(self) -> None:
        """Take up the newest undamaged checkpoint of the run, if there is one.

        Raises:
            UserError: its data set is another one, or the ranks do not see the same checkpoint.
        """
        saved = checkpoint.newest(self.run)
        images = saved.progress["images"] if saved else 0
        if distributed.from_rank_0(images) != images:
            raise UserError(
                f"{self.run}: rank {distributed.rank()} sees a checkpoint of {images} images, rank 0 another; put "
                "training.run where all nodes see it"
            )
        if saved is None:
            return
        try:
            self.stream.load_state_dict(saved.progress["stream"])
        except UserError as error:
            raise UserError(f"{error}, or choose another training.run than {self.run}") from None
        self.saved = saved.name
        checkpoint.fill(self.game, saved.tensors["game"], run=self.run)
        checkpoint.fill(self.average, saved.tensors["average"], run=self.run)
        for name, weight in self.game.named_parameters():
            slots = {slot: saved.tensors["optimizer"][f"{name}.{slot}"] for slot in ("step", "exp_avg", "exp_avg_sq")}
            # Adam counts its steps on the host, where reading them costs nothing.
            self.optimizer.state[weight] = {k: v if k == "step" else v.to(self.device) for k, v in slots.items()}
        self.images = images
        log.info("%s goes on from %s images", self.run, f"{self.images:,}")


def slow_data(metrics: dict[str, float]) -> str:
    """A line about the rank that waits longest for its data, if that is a tenth of its time or more."""
    parts = {name: metrics[f"data/wait/{name}"] for name in ("fetching", "decoding", "hand_over")}
    if (share := sum(parts.values())) < 0.1:
        return ""
    where = ", ".join(f"{name.replace('_', '-')} {part:.0%}" for name, part in parts.items())
    return f"rank {metrics['data/slowest_rank']:.0f} waits longest for data, {share:.0%} of its time ({where})"
