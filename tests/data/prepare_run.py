"""`main.py` with small autoencoders, and with pauses if the environment wants them."""

import importlib
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data")]

main, prepare, shard_writer, vae, prepared = map(
  importlib.import_module,
  (
    *("main", "elit_jax.data.prepare", "elit_jax.data.shard_writer"),
    *("elit_jax.models.vae", "prepared"),
  ),
)
vae.VAES.update(prepared.VAES)


def slowed(function):
  """With a pause before each call."""
  pause = float(os.environ.get("PAUSE", "0"))

  def call(*arguments):
    time.sleep(pause)
    return function(*arguments)

  return call


prepare.load = slowed(prepare.load)
# Between the files of a shard, too.
shard_writer.checksum = slowed(shard_writer.checksum)

if __name__ == "__main__":
  main.cli()
