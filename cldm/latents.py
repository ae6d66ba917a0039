"""Latents of more pictures than memory holds: encoded once, kept on disk, shared by runs and processes."""

import hashlib
import os
import sqlite3
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from ldm.base import roughly
from ldm.files import check_writable, writing
from ldm.pictures import fit_picture, pictures_to_tensor
from ldm.settings import InputError

LOADERS = 8  # threads that load pictures
PATIENCE = 60  # seconds to wait for another process that writes
BROKEN = sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR  # what a file is that has no such table


class CachedLatents:
    """Latents of rows, (B, 1 or 2, C, h, w) for a list of B indices; encoded when they are first asked for.

    They are encoded roughly, each picture alone, so that its latents depend on nothing else, and kept in float16 in
    folder/VAE_SIZE.sqlite. A picture is known by its path, size and time of last change; SQLite sees to it that
    processes take turns and that what a kill cuts off was never there.
    """

    def __init__(self, rows, base, image_size, folder):
        self.rows, self.base, self.image_size, self.lock = rows, base, image_size, threading.Lock()
        side = image_size // base.downsampling
        self.shape = base.unet.config.in_channels, side, side
        self.loaders = ThreadPoolExecutor(LOADERS)
        self.file = check_writable(folder) / f"{digest_vae(base)[:16]}_{image_size}.sqlite"
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.open():
            self.table = sqlite3.connect(self.file, PATIENCE, isolation_level=None, check_same_thread=False)
            self.table.execute("CREATE TABLE IF NOT EXISTS latents (picture BLOB PRIMARY KEY, latents BLOB)")

        print(f"{len(rows)} rows: latents are encoded when training comes to them, and kept in {self.file}")

    @contextmanager
    def open(self):
        """While open, the file belongs to one thread. Raises: InputError if it cannot be used."""
        try:
            with self.lock:
                yield
        except sqlite3.Error as error:
            what, remedy = f"cannot be used ({error})", "make room, or"
            if (getattr(error, "sqlite_errorcode", 0) & 0xFF) in BROKEN:
                what, remedy = f"{what}, expected a table of latents", "delete it, or"
            raise InputError(f"{self.file}: {what}; {remedy} choose another latents_cache") from None

    def __getitem__(self, which):
        rows = [self.rows[i] for i in which]
        keys = [identify(row) for row in rows]
        found = self.fetch({key for own in keys for key in own})
        lacking = [(row, own) for row, own in zip(rows, keys) if not found.keys() >= {*own}]
        new = {}
        with warnings.catch_warnings(action="ignore"):  # filters are the process's, and load_picture sets them
            for (_, own), pictures in zip(lacking, self.loaders.map(lambda pair: pair[0].load(), lacking)):
                for key, picture in zip(own, pictures):
                    if key not in found:
                        found[key] = new[key] = self.encode(picture)
        if new:
            self.keep(new)
        return torch.stack([torch.stack([found[key] for key in own]) for own in keys]).float()

    @torch.no_grad()
    def encode(self, picture):
        """Returns: (C, h, w) latents of a PIL picture, float16."""
        fitted = pictures_to_tensor([fit_picture(picture, self.image_size)]).to(self.base.device)
        with roughly(self.base.device):
            return self.base.encode(fitted)[0].half().cpu()

    def fetch(self, keys):
        """Returns: {key: latents} of those that are there."""
        found = {}
        with self.open():
            for key in keys:
                if row := self.table.execute("SELECT latents FROM latents WHERE picture = ?", [key]).fetchone():
                    found[key] = torch.frombuffer(bytearray(row[0]), dtype=torch.float16).view(self.shape)
        return found

    def keep(self, new):
        """Write {key: latents}, all or none."""
        rows = [(key, latents.numpy().tobytes()) for key, latents in new.items()]
        with self.open(), self.table:
            self.table.execute("BEGIN IMMEDIATE")
            self.table.executemany("INSERT OR IGNORE INTO latents VALUES (?, ?)", rows)


def identify(row):
    """Returns: a key for each of a Row's pictures, which changes with it. Raises: InputError if one is not there."""
    keys = []
    for path in row.pictures:
        try:
            seen = os.stat(path)
        except (OSError, ValueError):
            row.load()  # says what is wrong
            raise
        about = f"{path.absolute()}\n{seen.st_size} {seen.st_mtime_ns}"
        keys.append(hashlib.sha256(about.encode(errors="surrogateescape")).digest()[:16])
    return keys


def digest_vae(base):
    """Returns: a sha256, as text, of the weights of a LatentDiffusion's VAE and their precision."""
    total = hashlib.sha256(f"{base.vae.config.scaling_factor}".encode())
    for name, weight in sorted(base.vae.state_dict().items()):
        total.update(f"{name} {weight.dtype}".encode())
        total.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
