"""Several processes, on one machine or more, that train or read together on Lightning's Trainer."""

import logging
import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.files import check_writable, output_folder
from ldm.settings import InputError

STRATEGIES = "auto", "ddp"  # others scatter the weights, which checkpoints and pictures take from one process
HARDWARE = "accelerator", "device", "devices", "num_nodes", "strategy", "precision"
LOST = re.compile("closed by peer|reset by peer|broken pipe|connection was likely closed|remote process exited", re.I)
SLOWEST = timedelta(days=1)  # of a batch, after which the others give up


def hold_together(out_dir, hold=output_folder):
    """Hold out_dir for all processes: `hold(out_dir)` in the first, which alone prints.

    Returns: its Path; whether this is the first process, also among those of other machines.
    """
    first = rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"  # Lightning's rank is this machine's
    if not first:
        sys.stdout = None
    return (hold if first else check_writable)(out_dir), first


def start_trainer(s, **options):
    """Returns: a Lightning Trainer without its decorations, on the HARDWARE among a script's settings.

    Raises: InputError if that is not there, or has no use for one process's weights.
    """
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # on eval mode and workers, which are meant so
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if s.strategy not in STRATEGIES:
        remedy = "every process needs the whole model, so that save_memory=true is what takes less memory"
        raise InputError(f'setting "strategy": expected {" or ".join(STRATEGIES)}, got {s.strategy}; {remedy}')
    *others, last = keys = [key for key in HARDWARE if key in s]
    plain = ("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "use_distributed_sampler")
    hardware = {"accelerator" if key == "device" else key: s[key] for key in keys}
    try:
        return pl.Trainer(**dict.fromkeys(plain, False), **hardware, **options)
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise InputError(f"{', '.join(others)} or {last}: {str(error).splitlines()[0]}") from None


@contextmanager
def together(trainer):
    """While open, an error or SIGTERM ends the processes that this one started; the end of another is an InputError."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # until they all have begun
    try:
        yield
    except BaseException as error:
        unwatch(trainer)
        if launcher := trainer.strategy.launcher:
            launcher.kill(signal.SIGKILL)
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            raise InputError("another process has ended, perhaps with a line of its own; start again") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def unwatch(trainer):
    """Stop Lightning from killing this process, before it can say why, once one that it started has ended."""
    if launcher := trainer.strategy.launcher:
        watched, launcher.procs = launcher.procs, [*launcher.procs]
        watched.clear()


class SharedReading(pl.LightningModule):
    """Reads rows in turns: every process one batch, then the first keeps the results of all, in the rows' order.

    The batches are those that one process would read. model: ControlLDM. rows: an iterator over Rows; that of the
    first process begins after the `done` ones, the others' at the start. count: of all Rows.
    read: (a batch of Rows, the number of Rows before it) -> text. keep: (texts of a turn, its number of Rows), called
    in the first process.
    """

    def __init__(self, model, batch_size, rows, count, done, read, keep):
        super().__init__()
        self.model, self.batch_size, self.rows, self.count = model, batch_size, rows, count
        self.done, self.read, self.keep = done, read, keep

    def predict_dataloader(self):
        """Returns: the numbers of the turns."""
        trainer = self.trainer
        self.done, self.count = trainer.strategy.broadcast((self.done, self.count))
        if not trainer.is_global_zero:
            self.rows = islice(self.rows, self.done, None)
        return range(0, self.count - self.done, self.batch_size * trainer.world_size)

    def on_predict_start(self):
        self.group = dist.new_group(backend="gloo", timeout=SLOWEST)  # on a GPU, too: it notices when a process is gone
        unwatch(self.trainer)
        for number in (signal.SIGINT, signal.SIGTERM):  # Lightning's own handlers would wait for all processes
            signal.signal(number, self.stop)

    def stop(self, number, _):
        if self.trainer.is_global_zero:
            print("\nstopped; it goes on when it is started again with the same out_dir", file=sys.stderr)
        sys.exit(128 + number)

    def predict_step(self, *_):
        rank, processes, size = self.trainer.global_rank, self.trainer.world_size, self.batch_size
        rows = list(islice(self.rows, size * processes))
        own = rows[size * rank : size * (rank + 1)]
        text, texts = self.read(own, self.done + size * rank) if own else "", [None] * processes
        dist.gather_object(text, texts if rank == 0 else None, group=self.group, weights_only=True)
        if rank == 0:
            self.keep("".join(texts), len(rows))
        self.done += len(rows)


def read_together(s, model, rows, *how):
    """Read as SharedReading says, by the processes that a script's settings ask for."""
    trainer = start_trainer(s, logger=False, inference_mode=False)  # forward-mode derivatives are taken
    with together(trainer):
        trainer.predict(SharedReading(model, s.batch_size, rows, *how), return_predictions=False)
